"""How many tokens merge: the one rule of sender, receiver and latency model, Eq. (16)."""

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


def check_grid(grid: Grid) -> None:
    """Raise MegError for a grid without tokens."""
    if min(grid) < 1:
        raise MegError(f"token grid {grid[0]} x {grid[1]}: both sides must be at least 1")


def half(grid: Grid) -> Grid:
    """Return the grid of a round's destinations, the next round's tokens: one for each whole 2 x 2 cell."""
    return grid[0] // 2, grid[1] // 2


def partition_sizes(grid: Grid) -> tuple[int, int]:
    """Return (|A|, |B|): every whole 2 x 2 cell gives one destination, all other tokens are sources."""
    h, w = half(grid)
    return grid[0] * grid[1] - h * w, h * w


def most_merged(grid: Grid, rounds: Rounds = 2) -> tuple[int, ...]:
    """Return the most tokens that each round can merge: |A|, or 0 where the grid has no whole cell."""
    limits = []
    for _ in range(rounds):
        sources, destinations = partition_sizes(grid)
        limits.append(sources if destinations else 0)
        grid = half(grid)
    return tuple(limits)


def largest_ratio(grid: Grid, rounds: Rounds = 2) -> float:
    """Return the ratio beyond which nothing more merges: 15/16 on whole 4 x 4 cells, 3/4 in one round."""
    return sum(most_merged(grid, rounds)) / (grid[0] * grid[1])


def merged_counts(ratio: ScalarLike, grid: Grid, rounds: Rounds = 2) -> tuple[Count, ...]:
    """Return R of each round, Eq. (16): R = min(limit, floor(float32(r) N + 1e-4)), round 1 filled first.

    Args:
        ratio: merging ratio r in [0, 1]. A plain number gives Python integers; an array is traced, gives
            scalar arrays and is clipped to what the rounds can merge (a NaN counts as 0).
        grid: token rows and columns, N = rows x columns.
        rounds: 1 (clipped at |A|, the paper's) or 2.

    Raises:
        MegError: a static ratio outside [0, 1], or, with two rounds, beyond what they can merge.
    """
    check_grid(grid)
    if is_static(ratio):
        return _checked_counts(np.float32(np.asarray(ratio)), grid, rounds)
    tokens, limits = np.float32(grid[0] * grid[1]), most_merged(grid, rounds)
    product = jnp.asarray(ratio, jnp.float32) * tokens
    # The selection keeps the compiler from contracting product and sum to one rounding (an FMA), which would
    # make the traced count differ from the static one.
    product = jnp.where(product > 0, jnp.minimum(product, tokens), np.float32(0))
    total = jnp.floor(product + np.float32(1e-4)).astype(jnp.int32)
    return tuple(jnp.clip(total - sum(limits[:i]), 0, limit) for i, limit in enumerate(limits))


def clipped_counts(ratio: np.float32, grid: Grid, rounds: Rounds = 2) -> tuple[int, ...]:
    """Return R of each round as `merged_counts` does for a traced ratio: clipped, for a ratio in [0, 1]."""
    limits, total = most_merged(grid, rounds), _wanted(ratio, grid)
    return tuple(min(limit, max(0, total - sum(limits[:i]))) for i, limit in enumerate(limits))


def _checked_counts(ratio: np.float32, grid: Grid, rounds: Rounds) -> tuple[int, ...]:
    if not 0 <= ratio <= 1:
        raise MegError(f"merging ratio {ratio:g}: must be a number from 0 to 1")
    total, most = _wanted(ratio, grid), sum(most_merged(grid, rounds))
    if rounds > 1 and total > most:
        raise MegError(
            f"merging ratio {ratio:g} merges {total} of the {grid[0]} x {grid[1]} tokens, two rounds at most "
            f"{most}: use a ratio of at most {largest_ratio(grid, rounds):g}"
        )
    return clipped_counts(ratio, grid, rounds)


def _wanted(ratio: np.float32, grid: Grid) -> int:
    return int(np.floor(ratio * np.float32(grid[0] * grid[1]) + np.float32(1e-4)))
