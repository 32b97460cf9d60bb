"""Merged tokens and their plan to a message on the wire and back."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, ScalarLike

from megjax.errors import MegError
from megjax.link import wire
from megjax.link.counts import Grid, half, partition_sizes
from megjax.merging.partition import partition
from megjax.merging.plan import Matches, Plan, build_plan


class Received(NamedTuple):
    """What a message holds, in shapes that depend on its grid alone: one trace serves every ratio."""

    merged_NxD: Float[Array, "N D"]
    """Merged tokens; rows from `plan.count` on are zeros."""
    plan: Plan
    header: wire.Message


def pack(
    merged_MxD: Float[Array, "M D"],
    plan: Plan,
    key: PRNGKeyArray,
    ratio: ScalarLike,
    grid: Grid,
    *,
    dtype: wire.WireDtype = "float16",
    layout: wire.WireLayout = "patch",
) -> bytes:
    """Write one picture's merged tokens and plan as a message.

    Args:
        merged_MxD: what `merge` gave, without a batch; padding is left out.
        plan: what `match` gave for this key, ratio and grid, static or traced.
        key: the partition's key (threefry, JAX's default).
        ratio: merging ratio in [0, 1].
        grid: token rows and columns.
        dtype: how scalars are sent.
        layout: how the tokens make up the latent.

    Raises:
        MegError: see `wire.encode`; a batch of plans; a key of another generator.
    """
    if plan.row_N.ndim != 1:
        raise MegError(f"plans of {plan.row_N.shape[:-1]} pictures: a message holds one, pack each alone")
    key_data = np.asarray(jax.random.key_data(key))
    features_MxD = np.asarray(merged_MxD, np.float32)[: int(plan.count)]
    index_map = [(np.asarray(r.merged_A), np.asarray(r.best_A)) for r in plan.rounds]
    return wire.encode(
        features_MxD, index_map, grid=grid, ratio=ratio, key_data=key_data, dtype=dtype, layout=layout
    )


def unpack(message: bytes) -> Received:
    """Read a message and rebuild the sender's plan: its `unmerge` is the sender's bit for bit.

    Raises:
        WireFormatError: see `wire.decode`.
    """
    header = wire.decode(message)
    merged_MxD, grid = header.features_MxD, header.grid
    merged_NxD = np.zeros((grid[0] * grid[1], merged_MxD.shape[1]), np.float32)
    merged_NxD[: merged_MxD.shape[0]] = merged_MxD
    rounds, counts = list(header.index_map), [int(merged.sum()) for merged, _ in header.index_map]
    if len(rounds) == 1:
        sources, _ = partition_sizes(half(grid))
        rounds.append((np.zeros(sources, bool), np.zeros(sources, np.int32)))
        counts.append(0)
    matches = tuple(Matches(jnp.asarray(merged), jnp.asarray(best)) for merged, best in rounds)
    plan = rebuild_plan(jnp.asarray(header.key_data), matches, jnp.asarray(counts, jnp.int32), grid)
    return Received(jnp.asarray(merged_NxD), plan, header)


@partial(jax.jit, static_argnames="grid")
def rebuild_plan(key_data: Array, rounds: tuple[Matches, ...], count_R: Int[Array, " R"], grid: Grid) -> Plan:
    """Rebuild a plan of N rows from what a message carries: key data, each round's matches and count."""
    partitions = partition(jax.random.wrap_key_data(key_data, impl="threefry2x32"), grid)
    return build_plan(partitions, rounds, tuple(count_R), grid[0] * grid[1])
