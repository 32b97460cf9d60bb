"""n-step targets for critics: truncation bootstraps from the successor state, termination does not."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class NStep(NamedTuple):
    """The sum of a short stretch of frames, and where and with what weight a critic continues it."""

    partial: Float[Array, "b q"]
    """Discounted sum up to the end of the stretch."""
    discount: Float[Array, " b"]
    """gamma^(frames summed)."""
    successor: Float[Array, "b o"]
    """The state to bootstrap from."""
    terminated: Bool[Array, " b"]
    """Nothing follows that state."""


def n_step(
    signal_BxNxQ: Float[Array, "b n q"],
    terminated_BxN: Bool[Array, "b n"],
    truncated_BxN: Bool[Array, "b n"],
    successor_BxNxO: Float[Array, "b n o"],
    discount: float,
) -> NStep:
    """Sum n frames of rewards and costs, stopping where an episode ends inside the stretch.

    Args:
        signal_BxNxQ: rewards and costs of consecutive frames.
        terminated_BxN, truncated_BxN: how each frame ended.
        successor_BxNxO: each frame's successor, before any reset.
        discount: gamma.
    """
    n = signal_BxNxQ.shape[1]
    ended = terminated_BxN | truncated_BxN
    # Frame k counts if no earlier frame of the stretch ended its episode.
    before = jnp.cumsum(ended, axis=1) - ended
    counts_BxN = before == 0
    powers = discount ** jnp.arange(n, dtype=signal_BxNxQ.dtype)
    partial = jnp.sum(signal_BxNxQ * (counts_BxN * powers[None, :])[:, :, None], axis=1)
    last = jnp.sum(counts_BxN, axis=1) - 1
    at_last = (jnp.arange(n)[None, :] == last[:, None])[:, :, None]
    successor = jnp.sum(jnp.where(at_last, successor_BxNxO, 0.0), axis=1)
    terminated = jnp.any(at_last[:, :, 0] & terminated_BxN, axis=1)
    return NStep(partial, discount ** (last + 1).astype(signal_BxNxQ.dtype), successor, terminated)


def bootstrap(
    stretch: NStep, value_BxQ: Float[Array, "b q"], terminal_value: Float[Array, "b q"] | float = 0.0
) -> Float[Array, "b q"]:
    """Return the critics' targets.

    Args:
        stretch: from `n_step`.
        value_BxQ: the critics' values of the stretch's successors.
        terminal_value: value of having terminated; critics of rewards less a mean J hold it at -J / (1 -
            gamma).
    """
    follow = jnp.where(stretch.terminated[:, None], terminal_value, value_BxQ)
    return stretch.partial + stretch.discount[:, None] * follow
