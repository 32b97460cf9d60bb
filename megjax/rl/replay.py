"""Replay inside jit: flashbax's trajectory buffer, one for each group of environment copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flashbax
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from megjax.rl.algorithm import Transition


class Replay(NamedTuple):
    """A buffer's pure functions; every argument and result has the groups as leading axis."""

    init: Callable[[], Any]
    add: Callable[[Any, Transition], Any]
    """(state, transitions [G, E, T, ...]) -> state."""
    sample: Callable[[Any, PRNGKeyArray], Transition]
    """(state, key) -> stretches of consecutive frames [G, B, n, ...]."""


def make_replay(
    groups: int, envs: int, capacity: int, batch_size: int, length: int, sizes: tuple[int, int, int]
) -> Replay:
    """Return a replay of the last `capacity` frames of each group.

    Args:
        groups: G; each samples its own frames.
        envs: environment copies of a group.
        capacity: frames kept of each group.
        batch_size: stretches drawn of each group.
        length: n, frames of a stretch.
        sizes: of an observation, an action and a signal.
    """
    observation, action, signal = sizes
    buffer = flashbax.make_trajectory_buffer(
        add_batch_size=envs,
        sample_batch_size=batch_size,
        sample_sequence_length=length,
        period=1,
        min_length_time_axis=length,
        max_length_time_axis=max(capacity // envs, length + 1),
    )
    zeros = jnp.zeros
    item = Transition(
        zeros(observation), zeros(action), zeros(signal), zeros((), bool), zeros((), bool), zeros(observation)
    )

    def init() -> Any:
        return jax.vmap(lambda _: buffer.init(item))(jnp.arange(groups))

    # flashbax broadcasts by NumPy's rules, whatever the caller's setting.
    @jax.numpy_rank_promotion("allow")
    def add(state: Any, seen: Transition) -> Any:
        return jax.vmap(buffer.add)(state, seen)

    @jax.numpy_rank_promotion("allow")
    def sample(state: Any, key: PRNGKeyArray) -> Transition:
        return jax.vmap(buffer.sample)(state, jax.random.split(key, groups)).experience

    return Replay(init, add, sample)
