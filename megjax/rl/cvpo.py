"""MEG-CVPO: constrained policy optimisation as inference, a run compiled as one function, Eqs. (25)-(47).

An epoch collects a few frames from many environment copies and makes a few updates; an update trains the
critics on replayed frames, finds the best feasible re-weighting of the policy's own particles (E-step) and
fits the policy to it (M-step). Environment copies come in groups; each group has its own limits, its own mean
costs J and its own dual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from megjax.errors import MegError
from megjax.rl import networks
from megjax.rl.algorithm import (
    Algorithm,
    Means,
    PolicyParams,
    Transition,
    anneal,
    behaviour,
    check_settings,
    collect,
    in_groups,
    per_group,
    reset_copies,
    update_means,
)
from megjax.rl.env import Env
from megjax.rl.estep import Dual, DualSolver, EStep, e_step_gradient, e_step_newton
from megjax.rl.mstep import TrustRegion, m_step
from megjax.rl.networks import Gaussian, Mlp, Moments, Squash
from megjax.rl.replay import make_replay
from megjax.rl.targets import bootstrap, n_step

Threshold: TypeAlias = Literal["advantage", "value"]
"""What the E-step bounds: the change of the cost by d - J, or the whole return by d / (1 - gamma)."""


@dataclasses.dataclass(frozen=True)
class CvpoConfig:
    """MEG-CVPO's hyper-parameters."""

    groups: int = 1
    """Groups of environment copies, each with limits of its own."""
    envs: int = 512
    """Environment copies of each group."""
    greedy_envs: int = 256
    """How many of them act on the policy's mean. J then covers the larger cost of the sampled and of the
    deterministic policy, so that both keep the limits; 0 measures the sampled policy alone."""
    collect_steps: int = 4
    """Frames of each copy an epoch."""
    epochs: int = 4000
    updates_per_epoch: int = 1
    replay_frames: int = 131_072
    """Frames kept of each group."""
    critic_batch: int = 256
    """Replayed stretches of each group an update."""
    policy_batch: int = 64
    """How many of them also are the E- and M-step's states."""
    particles: int = 32
    """K, actions drawn in each state."""
    n_step: int = 2
    """Frames of a critic's target before it bootstraps."""
    discount: float = 0.97
    target_rate: float = 0.05
    """Soft update of the target critics."""
    hidden: tuple[int, ...] = (64, 64)
    shared_critic: bool = True
    """One trunk with an output for the reward and each cost, or a network each (the paper)."""
    knots: int = 32
    """Hat functions of each action that the critics see besides the action itself."""
    centred: bool = True
    """Critics of signals less their running means: the same advantages without a large constant to learn."""
    critic_lr: float = 1e-3
    actor_lr: float = 3e-4
    final_lr_share: float = 0.01
    """Both learning rates end at this share of their start, along a cosine."""
    kl_bound: float = 0.1
    """eps_E."""
    dual_solver: DualSolver = "newton"
    """Projected Newton, or the authors' gradient steps."""
    dual_iterations: int = 20
    dual_lr: float = 0.02
    """Of the gradient solver."""
    dual_max: float = 20.0
    """Of the gradient solver."""
    threshold: Threshold = "advantage"
    """c of Eq. (40): `advantage`, d - J, or the authors' `value`, d / (1 - discount)."""
    feedback: float = 0.3
    """Share of d - J that one E-step may repair."""
    integral: float = 0.001
    """Gain an update of the sum of d - J: removes what bias in the critics leaves."""
    mean_memory: float = 3.0
    """Epochs over which J is averaged; the policy itself integrates, so more only delays the feedback."""
    trust_region: TrustRegion = dataclasses.field(default_factory=TrustRegion)
    std_start: tuple[float, float] = (0.3, 0.3)
    """Lowest and highest standard deviation of the policy at the start."""
    std_end: tuple[float, float] = (0.01, 0.01)
    std_anneal: float = 0.7
    """Share of the run over which the bounds go, geometrically, from start to end."""
    squash: Squash = "none"
    """How the policy's mean is kept in [0, 1]: the environment clips, or by tanh (the authors')."""


class CvpoState(NamedTuple):
    """Everything a run carries; a checkpoint is this record."""

    step: Int[Array, ""]
    env_state: Any
    observation: Float[Array, "G E o"]
    moments: Moments
    replay: Any
    actor: Mlp
    actor_opt: optax.OptState
    beta: Float[Array, " 2"]
    critics: tuple[Mlp, ...]
    target_critics: tuple[Mlp, ...]
    critic_opt: optax.OptState
    dual: Dual
    """One eta and lam for each group."""
    means: Means
    integral: Float[Array, "G m"]


def make_cvpo(config: CvpoConfig, env: Env) -> Algorithm:
    """Return MEG-CVPO on an environment.

    Raises:
        MegError: a setting out of its range; batches, or a replay and an epoch, that do not fit each other.
    """
    check_settings(config)
    if config.policy_batch > config.critic_batch:
        raise MegError(f"policy_batch {config.policy_batch}: at most critic_batch, {config.critic_batch}")
    kept = config.replay_frames // config.envs
    if not config.n_step <= config.collect_steps <= kept:
        raise MegError(
            f"collect_steps {config.collect_steps}: from n_step, {config.n_step}, to the {kept} frames that "
            "the replay keeps of each copy, replay_frames // envs"
        )
    groups, m = config.groups, env.cost_size
    q = 1 + m
    replay = make_replay(
        groups,
        config.envs,
        config.replay_frames,
        config.critic_batch,
        config.n_step,
        (env.observation_size, env.action_size, q),
    )
    updates = config.epochs * config.updates_per_epoch
    actor_optimizer = optax.adam(
        optax.cosine_decay_schedule(
            config.actor_lr, updates * config.trust_region.iterations, config.final_lr_share
        )
    )
    critic_optimizer = optax.adam(
        optax.cosine_decay_schedule(config.critic_lr, updates, config.final_lr_share)
    )
    outputs = (q,) if config.shared_critic else (1,) * q
    solve = jax.vmap(_dual_solver(config), in_axes=(0, 0, 0, 0))

    def std_range(step: Array) -> tuple[Array, Array]:
        return anneal(config.std_start, config.std_end, step / max(1.0, config.std_anneal * config.epochs))

    def policy_at(actor: Mlp, observation: Array, step: Array) -> Gaussian:
        return networks.policy(actor, observation, std_range(step), config.squash)

    def init(key: PRNGKeyArray, params: Any) -> CvpoState:
        env_key, actor_key, critic_key = jax.random.split(key, 3)
        observation, env_state = reset_copies(env_key, env, per_group(params, groups), groups, config.envs)
        size, actions, hidden = env.observation_size, env.action_size, config.hidden
        actor = networks.init_policy(actor_key, size, actions, hidden)
        critics = networks.init_critics(critic_key, size, actions, hidden, outputs, config.knots)
        return CvpoState(
            step=jnp.zeros((), jnp.int32),
            env_state=env_state,
            observation=observation,
            moments=networks.init_moments(size),
            replay=replay.init(),
            actor=actor,
            actor_opt=actor_optimizer.init(actor),
            beta=jnp.zeros(2),
            critics=critics,
            target_critics=critics,
            critic_opt=critic_optimizer.init(critics),
            dual=Dual(jnp.ones(groups), jnp.zeros((groups, m))),
            means=Means(jnp.zeros((groups, q)), jnp.zeros((groups, m))),
            integral=jnp.zeros((groups, m)),
        )

    def gather(key: PRNGKeyArray, state: CvpoState, params: Any) -> tuple[CvpoState, Transition]:
        """Return the state after an epoch's frames, with those in its replay and averages, and the frames."""

        def act(key: PRNGKeyArray, observation: Array) -> Array:
            gaussian = policy_at(state.actor, networks.normalise(state.moments, observation), state.step)
            return behaviour(key, gaussian, config.greedy_envs)

        env_state, observation, seen = collect(
            key, in_groups(env), act, state.env_state, state.observation, params, config.collect_steps
        )
        moments = networks.update_moments(state.moments, seen.observation.reshape(-1, env.observation_size))
        share = jnp.maximum(1.0 / (state.step + 1.0), 1.0 / config.mean_memory)

        means = update_means(state.means, seen.signal, config.greedy_envs, share)
        gap = params.limits - means.costs
        # Anti-windup: the integral may ask for no more than the feedback asks of a gap of a tenth of the
        # limit.
        bound = 0.1 * config.feedback * jnp.abs(params.limits)
        state = state._replace(
            env_state=env_state,
            observation=observation,
            moments=moments,
            replay=replay.add(state.replay, seen),
            means=means,
            integral=jnp.clip(state.integral + config.integral * gap, -bound, bound),
        )
        return state, seen

    def train_critics(key: PRNGKeyArray, state: CvpoState, batch: Transition) -> tuple[CvpoState, Array]:
        """Take one gradient step on the n-step squared errors; batch [G, B, n, ...]."""
        centre_GxQ = state.means.signal if config.centred else jnp.zeros_like(state.means.signal)
        signal = batch.signal - centre_GxQ[:, None, None, :]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch._replace(signal=signal))
        stretch = n_step(flat.signal, flat.terminated, flat.truncated, flat.successor, config.discount)
        successor = networks.normalise(state.moments, stretch.successor)
        next_action = networks.sample(key, policy_at(state.actor, successor, state.step))
        next_value = networks.critics(state.target_critics, successor, next_action, config.knots)
        terminal = jnp.repeat(-centre_GxQ / (1.0 - config.discount), config.critic_batch, axis=0)
        target = bootstrap(stretch, next_value, terminal)
        observation = networks.normalise(state.moments, flat.observation[:, 0])

        def loss_of(critics: tuple[Mlp, ...]) -> Array:
            value = networks.critics(critics, observation, flat.action[:, 0], config.knots)
            return jnp.sum(jnp.mean((value - target) ** 2, axis=0))

        loss, gradient = jax.value_and_grad(loss_of)(state.critics)
        updates, critic_opt = critic_optimizer.update(gradient, state.critic_opt)
        critics = optax.apply_updates(state.critics, updates)
        target_critics = optax.incremental_update(critics, state.target_critics, config.target_rate)
        return state._replace(critics=critics, target_critics=target_critics, critic_opt=critic_opt), loss

    def improve(
        key: PRNGKeyArray, state: CvpoState, observation_GxSxO: Array, limits: Array
    ) -> tuple[CvpoState, EStep, Array]:
        """Make one E-step and one M-step on the batch's states."""
        states = observation_GxSxO.shape[1]
        flat = networks.normalise(state.moments, observation_GxSxO.reshape(-1, env.observation_size))
        old = policy_at(state.actor, flat, state.step)
        noise = jax.random.normal(key, (flat.shape[0], config.particles, env.action_size))
        particles = old.mean[:, None, :] + old.std[:, None, :] * noise
        values = networks.critics(state.target_critics, flat, particles, config.knots)
        values = values.reshape(groups, states, config.particles, q)
        reward, cost = values[..., 0], values[..., 1:]
        if config.threshold == "advantage":
            cost = cost - jnp.mean(cost, axis=2, keepdims=True)
            threshold = config.feedback * (limits - state.means.costs) + state.integral
        else:
            offset = state.means.signal[:, 1:] if config.centred else 0.0
            threshold = (limits - offset) / (1.0 - config.discount)
        found = solve(reward, cost, threshold, state.dual)
        fitted = m_step(
            lambda actor: policy_at(actor, flat, state.step),
            state.actor,
            state.actor_opt,
            state.beta,
            particles,
            found.weights_SxK.reshape(-1, config.particles),
            actor_optimizer,
            config.trust_region,
        )
        state = state._replace(
            actor=fitted.params, actor_opt=fitted.opt_state, beta=fitted.beta, dual=found.dual
        )
        return state, found, fitted.kl

    def epoch(key: PRNGKeyArray, state: CvpoState, params: Any) -> tuple[CvpoState, dict[str, Array]]:
        params = per_group(params, groups)
        keys = jax.random.split(jax.random.fold_in(key, state.step), 1 + config.updates_per_epoch)
        state, seen = gather(keys[0], state, params)

        def update(state: CvpoState, key: PRNGKeyArray) -> tuple[CvpoState, dict[str, Array]]:
            sample_key, critic_key, policy_key = jax.random.split(key, 3)
            batch = replay.sample(state.replay, sample_key)
            state, loss = train_critics(critic_key, state, batch)
            states = batch.observation[:, : config.policy_batch, 0]
            state, found, kl = improve(policy_key, state, states, params.limits)
            report = {
                "critic_loss": loss,
                "kl": kl,
                "kkt": jnp.max(found.kkt),
                "dual_iterations": jnp.mean(found.iterations.astype(loss.dtype)),
            }
            return state, report

        state, report = jax.lax.scan(update, state, keys[1:])
        explored = seen.signal[:, config.greedy_envs :]
        metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), report) | {
            "reward": jnp.mean(explored[..., 0], axis=(1, 2)),
            "cost": jnp.mean(explored[..., 1:], axis=(1, 2)),
            "mean_signal": state.means.signal,
            "greedy_excess": state.means.greedy_excess,
            "eta": state.dual.eta,
            "lam": state.dual.lam,
            "std": jnp.stack(std_range(state.step)),
        }
        return state._replace(step=state.step + 1), metrics

    def policy(state: CvpoState) -> PolicyParams:
        return PolicyParams(state.actor, state.moments, std_range(state.step))

    return Algorithm(init, epoch, policy, config.epochs)


def _dual_solver(config: CvpoConfig) -> Callable[[Array, Array, Array, Dual], EStep]:
    if config.dual_solver == "newton":

        def newton(reward: Array, cost: Array, threshold: Array, initial: Dual) -> EStep:
            return e_step_newton(
                reward,
                cost,
                threshold,
                config.kl_bound,
                initial,
                max_iterations=config.dual_iterations,
                tolerance=1e-4,
            )

        return newton

    def gradient(reward: Array, cost: Array, threshold: Array, initial: Dual) -> EStep:
        return e_step_gradient(
            reward,
            cost,
            threshold,
            config.kl_bound,
            initial,
            iterations=config.dual_iterations,
            learning_rate=config.dual_lr,
            max_dual=config.dual_max,
        )

    return gradient
