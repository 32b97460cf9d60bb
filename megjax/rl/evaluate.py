"""What a policy is worth: mean reward and costs, and how often single frames exceed the limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

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


def evaluate(
    key: PRNGKeyArray, env: Env, act: Act, params: Any, episodes: int = 1000, frames: int = 64
) -> Evaluation:
    """Return a policy's worth on fresh episodes."""
    reset_key, run_key = jax.random.split(key)
    observation, state = jax.vmap(env.reset, (0, None))(jax.random.split(reset_key, episodes), params)
    limits = jnp.asarray(params.limits, jnp.result_type(float))

    def frame(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Array]:
        observation, state, total, exceeded = carry
        action_key, env_key = jax.random.split(key)
        action = act(action_key, observation)
        keys = jax.random.split(env_key, episodes)
        step = jax.vmap(env.step, (0, 0, 0, None))
        observation, state, reward, *_, info = step(keys, state, action, params)
        over = jnp.mean(info["cost"] > limits[None, :], axis=0)
        return (observation, state, total + info["cost"], exceeded + over), jnp.mean(reward)

    zeros = jnp.zeros((episodes, env.cost_size))
    carry = (observation, state, zeros, jnp.zeros(env.cost_size))
    (_, _, total, exceeded), rewards = jax.lax.scan(frame, carry, jax.random.split(run_key, frames))
    means = total / frames
    return Evaluation(
        jnp.mean(rewards),
        jnp.mean(means, axis=0),
        exceeded / frames,
        jnp.mean(means > limits[None, :], axis=0),
    )
