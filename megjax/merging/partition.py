"""The random partition: one destination in every 2 x 2 cell of tokens, the rest sources."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from megjax.link.counts import Grid, Rounds, half, partition_sizes


class Partition(NamedTuple):
    """Sources A and destinations B of one round, as indices into the round's tokens.

    B is in row-major order of the cells, so that it forms the half-size grid. A holds the three sources of
    each cell in the same order, then the tokens of left-over rows and columns.
    """

    source_A: Int[Array, " A"]
    destination_B: Int[Array, " B"]
    slot_N: Int[Array, " N"]
    """Where each token stands in A followed by B."""


def partition(key: PRNGKeyArray, grid: Grid, rounds: Rounds = 2) -> tuple[Partition, ...]:
    """Draw the partition of each round from a key: both ends of a link derive the same one."""
    partitions = []
    for r in range(rounds):
        cells = partition_sizes(grid)[1]
        # Two bits of each draw: equal on every backend, and not tied to how `randint` maps bits to integers,
        # nor to a flag that the ends of a link may have set differently.
        with jax.threefry_partitionable(True):
            bits_B = jax.random.bits(jax.random.fold_in(key, r), (cells,), jnp.uint32)
        corner_B = (bits_B & 3).astype(jnp.int32)
        partitions.append(partition_from_corners(corner_B, grid))
        grid = half(grid)
    return tuple(partitions)


def fixed_partition(grid: Grid, rounds: Rounds = 2) -> tuple[Partition, ...]:
    """Return the partition whose destinations are the top-left token of each cell."""
    partitions = []
    for _ in range(rounds):
        corner_B = jnp.zeros((partition_sizes(grid)[1],), jnp.int32)
        partitions.append(partition_from_corners(corner_B, grid))
        grid = half(grid)
    return tuple(partitions)


def partition_from_corners(corner_B: Int[Array, " B"], grid: Grid) -> Partition:
    """Build a round's partition from the corner of each cell (0..3, row-major) that is its destination."""
    corner_Bx4, leftover = _cells(grid)
    rank_Bx3 = jnp.arange(3, dtype=jnp.int32)[None, :]
    rank_Bx3 = rank_Bx3 + (rank_Bx3 >= corner_B[:, None])
    source_A = jnp.take_along_axis(jnp.asarray(corner_Bx4), rank_Bx3, axis=1).reshape(-1)
    source_A = jnp.concatenate([source_A, jnp.asarray(leftover)])
    destination_B = jnp.take_along_axis(jnp.asarray(corner_Bx4), corner_B[:, None], axis=1)[:, 0]
    tokens = grid[0] * grid[1]
    order_N = jnp.concatenate([source_A, destination_B])
    slot_N = (
        jnp.zeros((tokens,), jnp.int32)
        .at[order_N]
        .set(jnp.arange(tokens, dtype=jnp.int32), unique_indices=True)
    )
    return Partition(source_A, destination_B, slot_N)


def _cells(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the token indices of each whole 2 x 2 cell, and those of the left-over rows and columns."""
    h, w = grid
    index = np.arange(h * w, dtype=np.int32).reshape(h, w)
    even = index[: h // 2 * 2, : w // 2 * 2]
    cells = even.reshape(h // 2, 2, w // 2, 2).swapaxes(1, 2).reshape(-1, 4)
    return cells, np.setdiff1d(index, even).astype(np.int32)
