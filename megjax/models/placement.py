"""How parameters are cut over a mesh, and gathered where a block uses them.

A rule of path and shape, so that parameters, gradients, averages and optimiser state agree without a table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, PyTree

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


def is_stacked(path: Sequence[Any]) -> bool:
    """Whether the leaf at `path`, strings or JAX's path entries, has a leading depth axis."""
    names = _names(path)
    return any(name in STACKED and not names[i + 1].isdigit() for i, name in enumerate(names[:-1]))


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
    names = _names(path)
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


def is_cut() -> bool:
    """Whether the mesh in use (`jax.set_mesh`) cuts parameters over `fsdp`."""
    return dict(jax.sharding.get_abstract_mesh().shape).get("fsdp", 1) > 1


def gathered(params: PyTree, dtype: Any) -> PyTree:
    """Parameters whole on every device and in `dtype`; the identity on meshes without `fsdp`.

    Stacked layers, which a scan gathers in turn, a U-Net's resnets, which gather their own, and what is small
    stay as they are. The gradient is summed over the devices straight into its own cut.

    Args:
        params: of a network, or of one layer of a stack.
        dtype: that it computes in; half of it is half the bytes to gather.
    """
    if not is_cut():
        return params
    mesh = jax.sharding.get_abstract_mesh()

    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        cut, names = partition(path, leaf.shape, mesh), _names(path)
        if "fsdp" not in cut or is_stacked(names) or "resnets" in names:
            return leaf
        whole = PartitionSpec(*(axis if axis == "tensor" else None for axis in cut))
        return checkpoint_name(_gather(leaf.astype(dtype), whole, cut), _GATHERED)

    return jax.tree_util.tree_map_with_path(gather, params)


_GATHERED = "gathered parameters"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, whole: PartitionSpec, cut: PartitionSpec) -> Array:
    # Cut first, so that it is the conversion's result that travels.
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, cut), whole)


def _gather_fwd(x: Array, whole: PartitionSpec, cut: PartitionSpec) -> tuple[Array, None]:
    return _gather(x, whole, cut), None


def _gather_bwd(whole: PartitionSpec, cut: PartitionSpec, _: None, grad: Array) -> tuple[Array]:
    del whole
    return (jax.lax.with_sharding_constraint(grad, cut),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gathering(run: Callable[[PyTree], Any], params: PyTree, inputs: PyTree, *, remat: bool) -> Any:
    """`run(params)`, gathering anew whatever the backward pass needs and whatever a loop around it repeats.

    Args:
        run: a network on its inputs.
        params: its parameters, cut.
        inputs: what changes from call to call: else a loop over calls would gather once, and keep all.
        remat: whether blocks recompute their activations, and with them what they gather. A policy round
            them would save what they do not.
    """
    if not is_cut():
        return run(params)
    arrays = [x for x in jax.tree.leaves(inputs) if isinstance(x, jax.Array)]
    params = _after(params, arrays)
    if remat:
        return run(params)
    policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
    return jax.checkpoint(run, policy=policy)(params)


@jax.custom_vjp
def _after(params: PyTree, arrays: list[Array]) -> PyTree:
    """`params`, which XLA may not use before `arrays` are there."""
    return jax.lax.optimization_barrier((params, arrays))[0]


def _after_fwd(params: PyTree, arrays: list[Array]) -> tuple[PyTree, None]:
    return _after(params, arrays), None


def _after_bwd(_: None, grads: PyTree) -> tuple[PyTree, None]:
    return grads, None


_after.defvjp(_after_fwd, _after_bwd)


def spread(x: Array) -> Array:
    """An array whose leading axis is the batch, over the mesh's `data` and `fsdp`, if there are any."""
    if batch_parts(x.shape[0]) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def batch_parts(batch: int) -> int:
    """Parts into which the mesh in use cuts a batch."""
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    parts = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
    return 1 if batch % parts else parts


def _names(path: Sequence[Any]) -> list[str]:
    """A path of strings: of dicts' keys, attributes or indices."""
    fields = ("key", "name", "idx")
    names = [str(next((getattr(e, f) for f in fields if hasattr(e, f)), e)) for e in path]
    # NNX keeps an array in a variable, under one more key.
    return [name for name in names if name not in ("value", "raw_value")]
