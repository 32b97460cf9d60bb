"""What both learners share: an algorithm's contract, the whole run as one function, annealing, collecting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from megjax.errors import MegError
from megjax.rl import networks
from megjax.rl.env import Env
from megjax.rl.networks import Gaussian, Mlp, Moments


class Transition(NamedTuple):
    """One frame: all that learner and critics ever see of the environment."""

    observation: Float[Array, "*b o"]
    action: Float[Array, "*b a"]
    signal: Float[Array, "*b q"]
    """Reward, then the costs."""
    terminated: Bool[Array, "*b"]
    truncated: Bool[Array, "*b"]
    successor: Float[Array, "*b o"]
    """The next state, before any reset."""


class PolicyParams(NamedTuple):
    """A trained policy: its network, the observations' moments and the range of its standard deviation."""

    actor: Mlp
    moments: Moments
    std_range: tuple[Float[Array, ""], Float[Array, ""]]


class Algorithm(NamedTuple):
    """A learner: pure functions that jit, vmap and scan."""

    init: Callable[[PRNGKeyArray, Any], Any]
    """(key, params) -> state."""
    epoch: Callable[[PRNGKeyArray, Any, Any], tuple[Any, dict[str, Array]]]
    """(key, state, params) -> (state, metrics). The key is the run's; the state knows its epoch."""
    policy: Callable[[Any], PolicyParams]
    """state -> the policy as of now."""
    epochs: int


_Rule: TypeAlias = tuple[tuple[str, ...], Callable[[float], bool], str]
_ALLOWED: tuple[_Rule, ...] = (
    (("discount",), lambda x: 0 <= x < 1, "from 0 to below 1"),
    (("gae", "target_rate"), lambda x: 0 <= x <= 1, "from 0 to 1"),
    (("std_start", "std_end", "kl_bound", "units"), lambda x: x > 0, "above 0"),
    (("particles",), lambda x: x >= 2, "at least 2"),
    (
        ("groups", "envs", "collect_steps", "epochs", "updates_per_epoch", "critic_batch", "policy_batch")
        + ("n_step", "hidden", "dual_iterations", "iterations", "passes", "minibatches", "mean_memory"),
        lambda x: x >= 1,
        "at least 1",
    ),
)
_REST: _Rule = ((), lambda x: x >= 0, "0 or more")


def check_settings(config: Any) -> None:
    """Refuse what would train to NaN or fail in the middle of a compilation.

    Args:
        config: a learner's hyper-parameters, a `CvpoConfig` or a `PpoConfig`.

    Raises:
        MegError: the first setting that is out of its range.
    """
    if not config.hidden:
        raise MegError("hidden (): give the width of at least one layer")
    if config.greedy_envs >= config.envs:
        raise MegError(f"greedy_envs {config.greedy_envs}: from 0 to below envs, {config.envs}, are allowed")
    # It also bounds the temperature that the particles' weights are divided by.
    if getattr(config, "dual_solver", None) == "gradient" and config.dual_max == 0:
        raise MegError("dual_max 0: must be above 0 under dual_solver gradient")
    if (
        hasattr(config, "particles")
        and config.particles >= 2
        and config.kl_bound >= math.log(config.particles)
    ):
        raise MegError(
            f"kl_bound {config.kl_bound}: no weights of {config.particles} particles differ by "
            f"{math.log(config.particles):.3g} or more; take less, or more particles"
        )
    for path, value in jax.tree.leaves_with_path(dataclasses.asdict(config)):
        name = [step.key for step in path if isinstance(step, jax.tree_util.DictKey)][-1]
        _, allows, text = next((rule for rule in _ALLOWED if name in rule[0]), _REST)
        if not isinstance(value, str) and not (math.isfinite(value) and allows(value)):
            raise MegError(f"{name} {value}: must be a finite number, {text}")


def whole_run(algorithm: Algorithm) -> Callable[[PRNGKeyArray, Any], tuple[Any, dict[str, Array]]]:
    """Return (key, params) -> (final state, metrics of every epoch), to be jitted and vmapped."""

    def train(key: PRNGKeyArray, params: Any) -> tuple[Any, dict[str, Array]]:
        init_key, run_key = jax.random.split(key)
        state = algorithm.init(init_key, params)
        return jax.lax.scan(lambda s, _: algorithm.epoch(run_key, s, params), state, None, algorithm.epochs)

    return train


def per_group(params: Any, groups: int) -> Any:
    """Return the parameters with the groups as leading axis; limits [G, m] differ, [m] are shared."""
    limits = jnp.atleast_2d(jnp.asarray(params.limits, jnp.result_type(float)))
    limits = jnp.broadcast_to(limits, (groups, limits.shape[1]))
    return jax.vmap(lambda own: dataclasses.replace(params, limits=own))(limits)


def reset_copies(key: PRNGKeyArray, env: Env, params: Any, groups: int, envs: int) -> tuple[Array, Any]:
    """Return observations [G, E, o] and states of fresh copies; `params` come from `per_group`."""
    keys = jax.random.split(key, (groups, envs))
    return jax.vmap(jax.vmap(env.reset, (0, None)))(keys, params)


def collect(
    key: PRNGKeyArray,
    step: Callable[..., tuple],
    act: Callable[[PRNGKeyArray, Float[Array, "*b o"]], Float[Array, "*b a"]],
    env_state: Any,
    observation: Float[Array, "*b o"],
    params: Any,
    frames: int,
) -> tuple[Any, Float[Array, "*b o"], Transition]:
    """Return the copies after some frames of a policy, and those frames [*b, T, ...].

    Args:
        key: of the policy and the environment.
        step: `Env.step` over the copies; its keys have the observations' leading axes.
        act: (key, observations) -> actions.
        env_state, observation: of the copies.
        params: as `step` takes them.
        frames: T.
    """
    copies = observation.shape[:-1]

    def frame(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Transition]:
        env_state, observation = carry
        action_key, env_key = jax.random.split(key)
        action = act(action_key, observation)
        env_keys = jax.random.split(env_key, copies)
        following, env_state, reward, terminated, truncated, info = step(env_keys, env_state, action, params)
        signal = jnp.concatenate([reward[..., None], info["cost"]], axis=-1)
        seen = Transition(observation, action, signal, terminated, truncated, info["final_observation"])
        return (env_state, following), seen

    keys = jax.random.split(key, frames)
    (env_state, observation), seen = jax.lax.scan(frame, (env_state, observation), keys)
    return env_state, observation, jax.tree.map(lambda x: jnp.moveaxis(x, 0, len(copies)), seen)


def in_groups(env: Env) -> Callable[..., tuple]:
    """Return `env.step` over copies [G, E] whose parameters differ between groups."""
    return jax.vmap(jax.vmap(env.step, (0, 0, 0, None)))


def behaviour(key: PRNGKeyArray, gaussian: Gaussian, greedy_envs: int) -> Float[Array, "G E a"]:
    """Return the copies' actions: the policy's mean in the first `greedy_envs`, samples in the rest."""
    explores = jnp.arange(gaussian.mean.shape[1]) >= greedy_envs
    return networks.sample(key, gaussian._replace(std=gaussian.std * explores[None, :, None]))


class Means(NamedTuple):
    """What the policy of late earns and costs in each group."""

    signal: Float[Array, "G q"]
    """Running mean reward and costs per frame of the sampled policy."""
    greedy_excess: Float[Array, "G m"]
    """Running mean of what the deterministic policy costs more than the sampled one."""

    @property
    def costs(self) -> Float[Array, "G m"]:
        """J: the sampled policy's mean costs, or the deterministic one's where larger."""
        return self.signal[:, 1:] + jnp.maximum(self.greedy_excess, 0.0)


def update_means(
    means: Means, signal_GxExTxQ: Float[Array, "G E T q"], greedy_envs: int, share: Float[Array, ""]
) -> Means:
    """Fold an epoch's frames into the running means, the new ones weighing `share`."""
    sampled = jnp.mean(signal_GxExTxQ[:, greedy_envs:], axis=(1, 2))
    greedy = jnp.mean(signal_GxExTxQ[:, :greedy_envs], axis=(1, 2)) if greedy_envs else sampled
    # The larger of two noisy means is too large on average; of a slow one it is by very little.
    slow_share = share / 10.0
    excess = (greedy - sampled)[:, 1:]
    return Means(
        means.signal + share * (sampled - means.signal),
        means.greedy_excess + slow_share * (excess - means.greedy_excess),
    )


def anneal(
    start: tuple[float, float], end: tuple[float, float], progress: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the lowest and highest standard deviation, on their geometric way from start to end."""
    share = jnp.clip(progress, 0.0, 1.0)
    return start[0] * (end[0] / start[0]) ** share, start[1] * (end[1] / start[1]) ** share
