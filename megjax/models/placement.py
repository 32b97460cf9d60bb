"""How parameters are cut over a mesh, and gathered where a block uses them.

A rule of path and shape, so that parameters, gradients, averages and optimiser state agree without a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

MIN_SIZE = 2**14
"""Leaves with fewer values, a layer, are replicated: norms and biases cost more to gather than to hold."""

STACKED = ("transformer_blocks", "layers")
"""Modules whose parameters have a leading depth axis: `megjax.models.layers.stack`."""

_TENSOR_AXIS = {
    # Attention by heads: q, k and v by their columns, the projection out by its rows.
    **dict.fromkeys(("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj"), -1),
    **dict.fromkeys(("to_out_0", "out_proj"), -2),
}


def is_stacked(path: Sequence[str]) -> bool:
    """Whether the leaf at `path` has a leading depth axis."""
    return any(name in STACKED and not path[i + 1].isdigit() for i, name in enumerate(path[:-1]))


def partition(
    path: Sequence[Any], shape: Sequence[int], mesh: Mesh | AbstractMesh, *, min_size: int = MIN_SIZE
) -> PartitionSpec:
    """Cut the largest axis that `fsdp` divides; attention's projections also by heads over `tensor`.

    The depth axis of stacked layers is never cut, so that `scan` gathers one layer at a time. Of equal axes
    the first is cut: the last lies along a TPU's 128 lanes, which a narrow part would leave unused.

    Args:
        path: of the leaf, strings or JAX's path entries.
        shape: of the leaf.
        mesh: with the axes `MESH_AXES`; of those that it lacks nothing is cut.
        min_size: leaves with fewer values, a layer, are replicated.
    """
    names = [_name(entry) for entry in path]
    first = int(is_stacked(names))
    if math.prod(shape[first:]) < min_size:
        return PartitionSpec()
    axes: list[str | None] = [None] * len(shape)
    sizes = dict(mesh.shape)
    tensor = _TENSOR_AXIS.get(names[-2]) if len(names) > 1 and names[-1] == "kernel" else None
    if tensor is not None and sizes.get("tensor", 1) > 1 and shape[tensor] % sizes["tensor"] == 0:
        axes[tensor] = "tensor"
    parts = sizes.get("fsdp", 1)
    free = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % parts == 0]
    if parts > 1 and free:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def _name(entry: Any) -> str:
    """A path entry's own name: of a dict's key, an attribute or an index."""
    for field in ("key", "name", "idx"):
        if hasattr(entry, field):
            return str(getattr(entry, field))
    return str(entry)
