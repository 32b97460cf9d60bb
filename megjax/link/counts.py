"""How many tokens merge: the one rule that sender, receiver and latency model share (spec section 5, Eq. (16))."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, ScalarLike

from megjax.errors import MegError

Grid: TypeAlias = tuple[int, int]
"""Rows and columns of the token grid."""
Rounds: TypeAlias = Literal[1, 2]
"""Matching rounds: 1 clips at |A|/N = 0.75 as the paper does, 2 reaches 15/16 (the default)."""
Count: TypeAlias = int | Int[jax.Array, ""]
"""A number of tokens: a Python integer for a static ratio, a scalar array for a traced one."""


def is_static(ratio: ScalarLike) -> bool:
    """Say whether `ratio` is a plain number, known before tracing, rather than a JAX array."""
    return not isinstance(ratio, jax.Array)


def partition_sizes(grid: Grid) -> tuple[int, int]:
    """Return (|A|, |B|): every whole 2 x 2 cell gives one destination, all other tokens are sources."""
    h, w = grid
    if h < 1 or w < 1:
        raise MegError(f"token grid {h} x {w}: both sides must be at least 1")
    destinations = (h // 2) * (w // 2)
    return h * w - destinations, destinations


def most_merged(grid: Grid, rounds: Rounds = 2) -> tuple[int, ...]:
    """Return the most tokens that each round can merge: |A|, or 0 where the grid has no whole cell."""
    limits = []
    for _ in range(rounds):
        sources, destinations = partition_sizes(grid)
        limits.append(sources if destinations else 0)
        if not destinations:
            break
        grid = (grid[0] // 2, grid[1] // 2)
    return tuple(limits) + (0,) * (rounds - len(limits))


def merged_counts(ratio: ScalarLike, grid: Grid, rounds: Rounds = 2) -> tuple[Count, ...]:
    """Return R of each round, Eq. (16): R = min(limit, floor(float32(r) N + 1e-4)), the first round filled first.

    Args:
        ratio: merging ratio r in [0, 1]. A plain number gives Python integers; an array is traced, gives scalar
            arrays and is clipped to what the rounds can merge (a NaN counts as 0).
        grid: token rows and columns, N = rows x columns.
        rounds: 1 (clipped at |A|, the paper's) or 2.

    Raises:
        MegError: a static ratio outside [0, 1], or, with two rounds, beyond what they can merge.
    """
    tokens = grid[0] * grid[1]
    limits = most_merged(grid, rounds)
    if is_static(ratio):
        total = _static_total(float(ratio), tokens)
        if rounds > 1 and total > sum(limits):
            raise MegError(
                f"merging ratio {float(ratio):g} asks for {total} of the {tokens} tokens of a {grid[0]} x {grid[1]} "
                f"grid, two rounds merge at most {sum(limits)}: use a ratio of at most {sum(limits) / tokens:g}"
            )
        return tuple(min(limit, max(0, total - sum(limits[:i]))) for i, limit in enumerate(limits))
    product = jnp.asarray(ratio, jnp.float32) * np.float32(tokens)
    # The selection keeps the compiler from contracting the product and the sum to one rounding (an FMA), which
    # would make the traced count differ from the static one.
    product = jnp.where(product > 0, jnp.minimum(product, np.float32(tokens)), np.float32(0))
    total = jnp.floor(product + np.float32(1e-4)).astype(jnp.int32)
    return tuple(jnp.clip(total - sum(limits[:i]), 0, limit) for i, limit in enumerate(limits))


def _static_total(ratio: float, tokens: int) -> int:
    if not 0 <= ratio <= 1:
        raise MegError(f"merging ratio {ratio!r}: must be a number from 0 to 1")
    return int(np.floor(np.float32(ratio) * np.float32(tokens) + np.float32(1e-4)))
