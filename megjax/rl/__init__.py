"""Online prediction: the constrained MDP of Eqs. (22)-(23), its optimum, MEG-CVPO and PPO-Lagrangian."""
