"""Merged tokens and their plan to a message on the wire and back."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from megjax.errors import MegError
from megjax.link import wire
from megjax.link.counts import Grid, half, partition_sizes
from megjax.merging.partition import partition
from megjax.merging.plan import Matches, Plan, build_plan

Carried: TypeAlias = dict[str, Array]
"""A message's content, in shapes that depend on its grid alone; see `carried_shapes`."""


class Received(NamedTuple):
    """What a message holds, in shapes that depend on its grid alone: one trace serves every ratio."""

    merged_NxD: Float[Array, "N D"]
    """Merged tokens; rows from `plan.count` on are zeros."""
    plan: Plan
    header: wire.Message


def pack(
    merged_MxD: Float[Array | np.ndarray, "M D"],
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
    content = carried(header)
    merged_NxD = jnp.asarray(content.pop("features"))
    return Received(merged_NxD, rebuild_plan(content, header.grid), header)


def carried_shapes(grid: Grid, values: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the device reads out of a message.

    `features`, merged tokens in float32, zeros after the last; `key_data` of the partition; and for each
    round, the second all zeros where there was none, `merged` (does this source merge?) and `best` (into
    which destination).

    Args:
        grid: token rows and columns.
        values: of a token.
    """
    N = grid[0] * grid[1]
    shapes = {
        "features": jax.ShapeDtypeStruct((N, values), jnp.float32),
        "key_data": jax.ShapeDtypeStruct((2,), jnp.uint32),
    }
    for i, each in enumerate((grid, half(grid)), start=1):
        sources, _ = partition_sizes(each)
        shapes[f"merged_{i}"] = jax.ShapeDtypeStruct((sources,), jnp.bool_)
        shapes[f"best_{i}"] = jax.ShapeDtypeStruct((sources,), jnp.int32)
    return shapes


def carried(message: wire.Message) -> dict[str, np.ndarray]:
    """A decoded message's content, padded to shapes that depend on its grid alone."""
    values = message.features_MxD.shape[1]
    arrays = {
        name: np.zeros(shape.shape, shape.dtype)
        for name, shape in carried_shapes(message.grid, values).items()
    }
    arrays["features"][: len(message.features_MxD)] = message.features_MxD
    arrays["key_data"][:] = message.key_data
    for i, (merged, best) in enumerate(message.index_map, start=1):
        arrays[f"merged_{i}"][:], arrays[f"best_{i}"][:] = merged, best
    return arrays


@partial(jax.jit, static_argnames="grid")
def rebuild_plan(content: Carried, grid: Grid) -> Plan:
    """Rebuild the sender's plan of N rows from a message's content, of which `features` are not read."""
    key = jax.random.wrap_key_data(content["key_data"], impl="threefry2x32")
    rounds = tuple(Matches(content[f"merged_{i}"], content[f"best_{i}"]) for i in (1, 2))
    counts = tuple(jnp.sum(matches.merged_A, dtype=jnp.int32) for matches in rounds)
    return build_plan(partition(key, grid), rounds, counts, grid[0] * grid[1])
