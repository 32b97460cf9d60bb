"""Presets of `python -m train.policy`."""

import dataclasses
from pathlib import Path

from megjax.rl.cvpo import CvpoConfig
from megjax.rl.mstep import TrustRegion
from megjax.rl.ppo import Pid, PpoConfig
from megjax.rl.training import PolicyRunConfig

DEFAULT = PolicyRunConfig(folder=Path("runs/policy/default"))
"""MEG-CVPO at 3 s and 1.8 kJ: `python -m train.policy default`, one CPU core, under a minute."""

CONDITIONED = PolicyRunConfig(
    learner=CvpoConfig(
        envs=128,
        greedy_envs=64,
        critic_batch=64,
        policy_batch=32,
        particles=24,
        hidden=(128, 128),
        replay_frames=65_536,
        epochs=5000,
    ),
    limits=((2.3, 1.8), (2.6, 1.8), (3.0, 1.8), (3.5, 1.8), (4.0, 1.8)),
    conditioned=True,
    folder=Path("runs/policy/conditioned"),
)
"""One policy for every limit from 2.3 to 4 s: `python -m train.policy conditioned`, one CPU core, minutes."""

PAPER = PolicyRunConfig(
    learner=CvpoConfig(
        envs=4,
        greedy_envs=0,
        collect_steps=64,
        epochs=100,
        updates_per_epoch=154,
        replay_frames=102_400,
        critic_batch=256,
        policy_batch=256,
        particles=32,
        hidden=(128, 128),
        shared_critic=False,
        knots=0,
        centred=False,
        actor_lr=5e-4,
        final_lr_share=1.0,
        kl_bound=0.02,
        dual_solver="gradient",
        dual_iterations=10,
        threshold="value",
        trust_region=TrustRegion(dual_lr=0.1, dual_max=0.5, iterations=5, project=False, box_penalty=0.0),
        std_start=(0.02, 4.5),
        std_end=(0.02, 4.5),
        squash="tanh",
    ),
    folder=Path("runs/policy/paper"),
)
"""The authors' hyper-parameters and threshold: `python -m train.policy paper`, one CPU core, minutes.

Expect collapse to few steps and full merging: the value form of the threshold asks too much of every single
action.
"""

PPO = PolicyRunConfig(learner=PpoConfig(), folder=Path("runs/policy/ppo"))
"""PPO-Lagrangian with a PID multiplier: `python -m train.policy ppo`, one CPU core, under a minute."""

PPO_PLAIN = PolicyRunConfig(
    learner=PpoConfig(pid=Pid(proportional=0.0, integral=0.05, max_error=1.0)),
    folder=Path("runs/policy/ppo_plain"),
)
"""Plain Lagrangian: the multiplier is the sum of violations. `python -m train.policy ppo_plain`, as `ppo`."""

FIGURE_6 = dataclasses.replace(
    DEFAULT,
    limits=((2.2, 1.8), (2.5, 1.8), (3.0, 1.8)),
    seeds=(0, 1, 2),
    folder=Path("runs/policy/figure_6"),
)
"""MEG-CVPO at three latency limits: `python -m train.policy figure-6`, one CPU core, minutes."""

PRESETS = {
    "default": ("MEG-CVPO at 3 s and 1.8 kJ a frame.", DEFAULT),
    "conditioned": ("MEG-CVPO: one policy for all limits from 2.3 to 4 s.", CONDITIONED),
    "paper": ("MEG-CVPO with the authors' hyper-parameters.", PAPER),
    "ppo": ("PPO-Lagrangian with a PID multiplier.", PPO),
    "ppo-plain": ("Plain PPO-Lagrangian.", PPO_PLAIN),
    "figure-6": ("MEG-CVPO at three latency limits, three seeds each.", FIGURE_6),
}
