"""Where parameters, optimiser state and batches lie on a mesh of devices.

Every axis is `AxisType.Auto`: programs are written for the whole, `jax.jit` splits them. Run a step under
`jax.set_mesh(mesh)`, so that the networks gather a block's parameters where they use them
(`megjax.models.placement`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from megjax.errors import MegError
from megjax.models.placement import BATCH_AXES, MESH_AXES, MIN_SIZE, partition
from megjax.training.step import TrainState


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices as `data` x `fsdp` x `tensor`.

    Args:
        data: copies of the parameters, each for its part of the batch; -1 takes the devices that are left.
        fsdp: parts that each parameter is cut into; each part has its part of the batch, too. May be -1.
        tensor: parts that a matrix product is cut into. May be -1.
        devices: all there are, unless given.

    Raises:
        MegError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise MegError(f"{given}: give positive sizes, one of them -1 at most, to take the devices left")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise MegError(f"{given}: needs a multiple of {fixed} devices, there are {len(devices)}")
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), devices=devices)


def check_batch(batch: int, accumulate: int, mesh: Mesh) -> None:
    """Refuse a batch that does not divide.

    Args:
        batch: over all devices.
        accumulate: parts that are computed one after the other.
        mesh: from `make_mesh`.

    Raises:
        MegError: it is no multiple of the parts times the devices that it is cut over; see `batch_part`.
    """
    batch_part(mesh)
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch % (rows * accumulate):
        raise MegError(
            f"batch {batch}: must be a multiple of {rows * accumulate}: {rows} devices that it is cut over, "
            f"times {accumulate} parts to accumulate"
        )


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Return which part of a batch this process holds, and how many parts there are.

    As many as processes, unless a tensor group spans several: these hold the same rows.

    Args:
        mesh: from `make_mesh`.

    Raises:
        MegError: processes share some of their rows, but not all.
    """
    return _part([[d.process_index for d in row] for row in mesh.devices.reshape(-1, mesh.shape["tensor"])])


def _part(processes: Sequence[Sequence[int]], own: int | None = None) -> tuple[int, int]:
    """As `batch_part`, of the processes whose devices hold each block of rows."""
    blocks: dict[int, set[int]] = {}
    for block, group in enumerate(processes):
        for process in group:
            blocks.setdefault(process, set()).add(block)
    parts = sorted({tuple(sorted(found)) for found in blocks.values()})
    if sum(map(len, parts)) != len(processes) or len({len(part) for part in parts}) != 1:
        raise MegError(
            f"tensor {len(processes[0])}: its groups share some of their processes' devices, but not all; "
            "let it divide the devices of a process, or be a multiple of them"
        )
    own = jax.process_index() if own is None else own
    return parts.index(tuple(sorted(blocks[own]))), len(parts)


def param_shardings(
    shapes: PyTree, mesh: Mesh, *, min_size: int = MIN_SIZE, memory_kind: str | None = None
) -> PyTree:
    """Cut each leaf over `fsdp` (and `tensor`) by its path and shape, see `megjax.models.placement`.

    Optimiser state has its parameters' paths and shapes below its own, so it lies where they lie.

    Args:
        shapes: tree of arrays or `jax.ShapeDtypeStruct`.
        mesh: from `make_mesh`.
        min_size: leaves with fewer values, a layer, are replicated.
        memory_kind: such as `pinned_host`; the device's own unless given.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = partition(path, leaf.shape, mesh, min_size=min_size)
        return NamedSharding(mesh, spec, memory_kind=memory_kind)

    return jax.tree_util.tree_map_with_path(sharding, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose leading axis is the batch: over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def even_sharding(rows: int, mesh: Mesh) -> NamedSharding:
    """Of a batch of any size: over those of the batch's axes that divide it, on every device if none does."""
    return NamedSharding(mesh, PartitionSpec(_even_axes(rows, mesh.shape)))


def _even_axes(rows: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    choices = (BATCH_AXES, *((axis,) for axis in reversed(BATCH_AXES)), ())
    return next(axes for axes in choices if rows % math.prod(sizes[axis] for axis in axes) == 0)


def replicated(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole: keys, step numbers, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state_shapes: TrainState, mesh: Mesh, *, offload_ema: bool = False) -> TrainState:
    """Shardings of a whole training state, in its structure.

    Args:
        state_shapes: from `jax.eval_shape(init_state, ...)`.
        mesh: from `make_mesh`.
        offload_ema: keep the moving average in the hosts' memory.
    """
    shardings = param_shardings(state_shapes, mesh)
    if offload_ema:
        return shardings._replace(ema=param_shardings(state_shapes.ema, mesh, memory_kind="pinned_host"))
    return shardings
