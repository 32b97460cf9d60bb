"""PPO-Lagrangian, Eq. (24): clipped policy gradients of J_r - sum_i lam_i J_i, lam under PID control.

The baseline of MEG-CVPO, with the same networks, environment copies and whole-run compilation. PID: Stooke et
al. 2020, arXiv 2007.03964; with only the integral gain it is the plain Lagrangian method.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

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
from megjax.rl.networks import Gaussian, Mlp, Moments, Squash


@dataclasses.dataclass(frozen=True)
class Pid:
    """Gains on the violation, (J - d) / d; only `integral` > 0 is the plain Lagrangian method."""

    proportional: float = 20.0
    """Of the violation itself."""
    integral: float = 0.5
    """Of its sum over the epochs."""
    derivative: float = 0.0
    """Of its growth since the last epoch."""
    max_error: float = 0.02
    """Largest violation that the integral counts: what early exploration costs must not wind it up."""
    max_multiplier: float = 100.0
    units: tuple[float, float] | None = None
    """Of latency (s) and energy (kJ): violations are J - d in these, and multipliers apply to them. Left out,
    violations are relative, and multipliers apply to seconds and kilojoules."""


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """PPO-Lagrangian's hyper-parameters."""

    groups: int = 1
    """Groups of environment copies, each with limits of its own."""
    envs: int = 384
    """Environment copies of each group."""
    greedy_envs: int = 128
    """How many of them act on the policy's mean, for the controller to see, as in `CvpoConfig`."""
    collect_steps: int = 16
    """Frames of each copy an epoch."""
    epochs: int = 500
    passes: int = 4
    """Times that an epoch's frames are gone through."""
    minibatches: int = 8
    discount: float = 0.97
    gae: float = 0.95
    clip: float = 0.2
    target_kl: float = 0.02
    """An epoch's updates stop once KL(old || new) is over it."""
    lr: float = 3e-4
    final_lr_share: float = 0.03
    hidden: tuple[int, ...] = (64, 64)
    pid: Pid = dataclasses.field(default_factory=Pid)
    mean_memory: float = 2.0
    """Epochs over which the cost that the controller sees is averaged."""
    std_start: tuple[float, float] = (0.3, 0.3)
    std_end: tuple[float, float] = (0.01, 0.01)
    std_anneal: float = 0.7
    squash: Squash = "none"
    box_penalty: float = 1.0


class PpoState(NamedTuple):
    """Everything a run carries."""

    step: Int[Array, ""]
    env_state: Any
    observation: Float[Array, "G E o"]
    moments: Moments
    actor: Mlp
    critic: Mlp
    """One trunk: the value of the reward and of each cost, all less their running means."""
    opt: optax.OptState
    means: Means
    violation: Float[Array, "G m"]
    """Last relative violation, for the derivative."""
    integral: Float[Array, "G m"]
    lam: Float[Array, "G m"]


def pid_multiplier(
    pid: Pid, violation: Float[Array, "*b"], previous: Float[Array, "*b"], integral: Float[Array, "*b"]
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Return the multiplier and the new integral; only growth of the violation counts in the derivative."""
    error = jnp.clip(violation, -pid.max_error, pid.max_error)
    integral = jnp.clip(integral + pid.integral * error, 0.0, pid.max_multiplier)
    slope = jnp.maximum(violation - previous, 0.0)
    lam = jnp.clip(pid.proportional * violation + integral + pid.derivative * slope, 0.0, pid.max_multiplier)
    return lam, integral


def violations(
    pid: Pid, costs_GxM: Float[Array, "*g m"], limits_GxM: Float[Array, "*g m"]
) -> Float[Array, "*g m"]:
    """Return by how much mean costs are over their limits, as the gains count it."""
    if pid.units is None:
        return costs_GxM / limits_GxM - 1.0
    return (costs_GxM - limits_GxM) / jnp.broadcast_to(jnp.asarray(pid.units), costs_GxM.shape)


def prices(pid: Pid, lam_GxM: Float[Array, "*g m"]) -> Float[Array, "*g m"]:
    """Return what a second and a kilojoule cost in reward at these multipliers."""
    if pid.units is None:
        return lam_GxM
    return lam_GxM / jnp.broadcast_to(jnp.asarray(pid.units), lam_GxM.shape)


def gae(
    signal_TxBxQ: Float[Array, "T *b q"],
    value_TxBxQ: Float[Array, "T *b q"],
    successor_value_TxBxQ: Float[Array, "T *b q"],
    terminated_TxB: Array,
    truncated_TxB: Array,
    discount: float,
    decay: float,
) -> Float[Array, "T *b q"]:
    """Return generalised advantages; truncated frames bootstrap from their successor, terminated do not."""
    follows = (~terminated_TxB)[..., None]
    delta = signal_TxBxQ + discount * follows * successor_value_TxBxQ - value_TxBxQ
    carries_on = (~(terminated_TxB | truncated_TxB))[..., None]

    def back(later: Array, frame: tuple) -> tuple[Array, Array]:
        delta, carries_on = frame
        advantage = delta + discount * decay * carries_on * later
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, carries_on), reverse=True)[1]


def make_ppo(config: PpoConfig, env: Env) -> Algorithm:
    """Return PPO-Lagrangian on an environment.

    Raises:
        MegError: a setting out of its range, or an epoch's frames that the minibatches do not divide.
    """
    check_settings(config)
    groups, m = config.groups, env.cost_size
    frames = groups * (config.envs - config.greedy_envs) * config.collect_steps
    if frames % config.minibatches:
        raise MegError(f"minibatches {config.minibatches}: they must divide the {frames} frames of an epoch")
    updates = config.epochs * config.passes * config.minibatches
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(config.lr, updates, config.final_lr_share)),
    )

    def policy_at(actor: Mlp, observation: Array, step: Array) -> Gaussian:
        return networks.policy(actor, observation, std_range(step), config.squash)

    def std_range(step: Array) -> tuple[Array, Array]:
        return anneal(config.std_start, config.std_end, step / max(1.0, config.std_anneal * config.epochs))

    def init(key: PRNGKeyArray, params: Any) -> PpoState:
        keys = jax.random.split(key, 3)
        observation, env_state = reset_copies(keys[0], env, per_group(params, groups), groups, config.envs)
        actor = networks.init_policy(keys[1], env.observation_size, env.action_size, config.hidden)
        critic = networks.init_mlp(keys[2], (env.observation_size, *config.hidden, 1 + m), last_scale=0.1)
        zeros = jnp.zeros((groups, m))
        return PpoState(
            step=jnp.zeros((), jnp.int32),
            env_state=env_state,
            observation=observation,
            moments=networks.init_moments(env.observation_size),
            actor=actor,
            critic=critic,
            opt=optimizer.init((actor, critic)),
            means=Means(jnp.zeros((groups, 1 + m)), zeros),
            violation=zeros,
            integral=zeros,
            lam=zeros,
        )

    def control(state: PpoState, signal: Array, limits: Array) -> PpoState:
        share = jnp.maximum(1.0 / (state.step + 1.0), 1.0 / config.mean_memory)
        means = update_means(state.means, signal, config.greedy_envs, share)
        violation = violations(config.pid, means.costs, limits)
        lam, integral = pid_multiplier(config.pid, violation, state.violation, state.integral)
        return state._replace(means=means, violation=violation, integral=integral, lam=lam)

    def epoch(key: PRNGKeyArray, state: PpoState, params: Any) -> tuple[PpoState, dict[str, Array]]:
        params = per_group(params, groups)
        collect_key, *pass_keys = jax.random.split(jax.random.fold_in(key, state.step), 1 + config.passes)
        moments = state.moments

        def act(key: PRNGKeyArray, observation: Array) -> Array:
            gaussian = policy_at(state.actor, networks.normalise(moments, observation), state.step)
            return behaviour(key, gaussian, config.greedy_envs)

        env_state, following, seen = collect(
            collect_key, in_groups(env), act, state.env_state, state.observation, params, config.collect_steps
        )
        state = state._replace(env_state=env_state, observation=following)
        state = control(state, seen.signal, params.limits)
        seen = jax.tree.map(lambda x: x[:, config.greedy_envs :], seen)

        observation = networks.normalise(moments, seen.observation)
        value = networks.mlp(state.critic, observation, jnp.tanh)
        successor_value = networks.mlp(state.critic, networks.normalise(moments, seen.successor), jnp.tanh)
        # Values of signals less their running mean: the same advantages without a large constant to learn.
        # What has terminated is then worth -J / (1 - gamma), which enters as one more reward.
        centre = state.means.signal[:, None, None, :]
        terminal = -centre * seen.terminated[..., None] * config.discount / (1.0 - config.discount)
        signal, before, after, ended, cut = jax.tree.map(
            lambda x: jnp.moveaxis(x, 2, 0),
            (seen.signal - centre + terminal, value, successor_value, seen.terminated, seen.truncated),
        )
        advantage = jnp.moveaxis(gae(signal, before, after, ended, cut, config.discount, config.gae), 0, 2)
        target = advantage + value
        lam = prices(config.pid, state.lam)
        price = jnp.concatenate([jnp.ones((groups, 1)), -lam], axis=1)
        price = price / (1.0 + jnp.sum(lam, axis=1, keepdims=True))
        mixed = jnp.sum(advantage * price[:, None, None, :], axis=-1)
        mixed = mixed - jnp.mean(mixed, axis=(1, 2), keepdims=True)
        mixed = mixed / (jnp.std(mixed, axis=(1, 2), keepdims=True) + 1e-8)
        old = policy_at(state.actor, observation, state.step)
        batch = (observation, seen.action, old.mean, old.std, mixed, target)
        batch = jax.tree.map(lambda x: x.reshape(frames, *x.shape[3:]), batch)

        def loss_of(weights: tuple[Mlp, Mlp], batch: tuple) -> tuple[Array, Array]:
            actor, critic = weights
            observation, action, old_mean, old_std, advantage, target = batch
            old, new = Gaussian(old_mean, old_std), policy_at(actor, observation, state.step)
            ratio = jnp.exp(networks.log_prob(new, action) - networks.log_prob(old, action))
            clipped = jnp.clip(ratio, 1.0 - config.clip, 1.0 + config.clip)
            surrogate = jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))
            outside = jnp.maximum(jnp.abs(new.mean - 0.5) - 0.5, 0.0)
            penalty = config.box_penalty * jnp.mean(jnp.sum((outside / old.std) ** 2, axis=-1))
            error = jnp.mean(jnp.sum((networks.mlp(critic, observation, jnp.tanh) - target) ** 2, axis=-1))
            kl = sum(jnp.mean(part) for part in networks.kl_parts(old, new))
            return -surrogate + penalty + error, jnp.asarray(kl)

        def one_pass(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Array]:
            order = jax.random.permutation(key, frames)
            shuffled = jax.tree.map(lambda x: x[order].reshape(config.minibatches, -1, *x.shape[1:]), batch)

            def update(carry: tuple, minibatch: tuple) -> tuple[tuple, Array]:
                weights, opt, stopped = carry
                (_, kl), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights, minibatch)
                # The critic learns on; only the policy stops.
                stopped = stopped | (kl > config.target_kl)
                (policy, critic), opt = cast(tuple, optimizer.update(gradient, opt, weights))
                updates = (jax.tree.map(lambda u: jnp.where(stopped, 0.0, u), policy), critic)
                return (optax.apply_updates(weights, updates), opt, stopped), kl

            return jax.lax.scan(update, carry, shuffled)

        carry = ((state.actor, state.critic), state.opt, jnp.zeros((), bool))
        (weights, opt, _), kl = jax.lax.scan(one_pass, carry, jnp.stack(pass_keys))
        metrics = {
            "reward": jnp.mean(seen.signal[..., 0], axis=(1, 2)),
            "cost": jnp.mean(seen.signal[..., 1:], axis=(1, 2)),
            "mean_signal": state.means.signal,
            "lam": state.lam,
            "kl": kl[-1, -1],
            "std": jnp.stack(std_range(state.step)),
        }
        moments = networks.update_moments(moments, seen.observation.reshape(-1, env.observation_size))
        actor, critic = weights
        state = state._replace(step=state.step + 1, moments=moments, actor=actor, critic=critic, opt=opt)
        return state, metrics

    def policy(state: PpoState) -> PolicyParams:
        return PolicyParams(state.actor, state.moments, std_range(state.step))

    return Algorithm(init, epoch, policy, config.epochs)
