"""Batched rollouts of any policy, and what it is worth: mean reward and costs, frames above the limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from megjax.rl.algorithm import Transition, collect
from megjax.rl.env import Env

Act: TypeAlias = Callable[[PRNGKeyArray, Float[Array, "b o"]], Float[Array, "b a"]]
"""(key, observations) -> actions."""


class Evaluation(NamedTuple):
    """Means over all frames of all episodes."""

    reward: Float[Array, ""]
    costs: Float[Array, " m"]
    violations: Float[Array, " m"]
    """Share of single frames above each limit (the limits are on the mean: an optimum has many)."""
    episode_violations: Float[Array, " m"]
    """Share of episodes whose mean is above each limit."""


def rollout(key: PRNGKeyArray, env: Env, act: Act, params: Any, copies: int, frames: int = 64) -> Transition:
    """Return the first frames [copies, frames, ...] of fresh environment copies under a policy.

    Args:
        key: of the copies, the policy and the channel.
        env: the environment; copies whose episode ends go on with the next.
        act: the policy.
        params: the environment's parameters, the same for all copies.
        copies: run side by side.
        frames: of each copy.
    """
    reset_key, run_key = jax.random.split(key)
    observation, state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, copies), params)
    return collect(run_key, jax.vmap(env.step, (0, 0, 0, None)), act, state, observation, params, frames)[2]


def evaluate(
    key: PRNGKeyArray, env: Env, act: Act, params: Any, episodes: int = 1000, frames: int = 64
) -> Evaluation:
    """Return a policy's worth on fresh episodes."""
    seen = rollout(key, env, act, params, episodes, frames)
    reward, cost = seen.signal[..., 0], seen.signal[..., 1:]
    limits = jnp.asarray(params.limits, cost.dtype)
    return Evaluation(
        jnp.mean(reward),
        jnp.mean(cost, axis=(0, 1)),
        jnp.mean(cost > limits[None, None, :], axis=(0, 1)),
        jnp.mean(jnp.mean(cost, axis=1) > limits[None, :], axis=0),
    )
