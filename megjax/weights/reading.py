"""Reading a component's weights, leaf by leaf, into a parameter tree whose shapes are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from megjax.errors import WeightsError
from megjax.weights import formats, names
from megjax.weights.stored import DTYPES, Tensor


class _Source(NamedTuple):
    name: str
    slot: names.Slot
    tensor: Tensor


def load(
    folder: str | Path,
    shapes: Mapping[str, Any],
    *,
    dtype: DTypeLike | None = None,
    shardings: Any = None,
    variant: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Load one component's weights from safetensors or Flax msgpack, whole or sharded.

    All names and shapes are checked before anything is read; then each leaf goes to its dtype and sharding
    before the next is read, so host memory holds about one leaf besides the result.

    Args:
        folder: of the component, such as `unet`.
        shapes: nested dict of `jax.ShapeDtypeStruct`, such as `Network.shapes`.
        dtype: of the result; None takes each leaf's from `shapes`.
        shardings: one `jax.sharding.Sharding`, or a tree of them like `shapes`; None is the default device.
        variant: such as `fp16`; None takes the plain file, or the only one there is.
        progress: called with the bytes read so far, and in all.

    Raises `WeightsError` for missing, unexpected and misshapen tensors, naming the first few of each, for
    truncated files and for values that are not finite in the dtype.
    """
    path = formats.find(Path(folder), variant)
    leaves = names.flatten(shapes)
    sources = _match(path, names.slots(shapes), formats.tensors(path))
    per_leaf = (
        names.flatten(shardings) if isinstance(shardings, Mapping) else dict.fromkeys(leaves, shardings)
    )
    if missing := leaves.keys() - per_leaf.keys():
        raise WeightsError(f"shardings: none for {formats.first(sorted(map('/'.join, missing)))}")

    done, total = 0, sum(source.tensor.nbytes for source in sources)
    by_leaf: dict[tuple[str, ...], list[_Source]] = {}
    for source in sources:
        by_leaf.setdefault(source.slot.path, []).append(source)
    loaded = {}
    for leaf_path, leaf in leaves.items():
        host = np.empty(leaf.shape, leaf.dtype if dtype is None else dtype)
        for source in by_leaf[leaf_path]:
            done += _fill(path, host if source.slot.layer is None else host[source.slot.layer, ...], source)
        loaded[leaf_path] = _put(host, per_leaf[leaf_path])
        del host
        if progress:
            progress(done, total)
    return unflatten_dict(loaded)


def _match(path: Path, slots: dict[str, names.Slot], tensors: dict[str, Tensor]) -> list[_Source]:
    """Pair each slot with its stored tensor, or say all that is wrong at once."""
    sources: dict[str, _Source] = {}
    unexpected, misshapen, untyped = [], [], []
    for name, tensor in tensors.items():
        key = names.canonical(name)
        if names.is_buffer(name):
            continue
        if key not in slots or key in sources:
            unexpected.append(name)
            continue
        slot = slots[key]
        sources[key] = _Source(name, slot, tensor)
        # A scalar broadcast to a shape has the shape's views but no memory.
        if names.to_ours(np.broadcast_to(0, tensor.shape), name, slot).shape != slot.shape:
            layout = "torch" if name.endswith("weight") else "flax"
            expected = names.to_stored(np.broadcast_to(0, slot.shape), slot, layout).shape
            misshapen.append(f"{name} is {tensor.shape}, expected {expected}")
        elif tensor.dtype not in DTYPES:
            untyped.append(f"{name} is {tensor.dtype}, expected {', '.join(DTYPES)}")
    missing = [key for key in slots if key not in sources]
    complaints = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "of another type": untyped,
    }
    if any(complaints.values()):
        wrong = "; ".join(
            f"{formats.count(which, 'tensor')} {what}: {formats.first(which)}"
            for what, which in complaints.items()
            if which
        )
        raise WeightsError(f"{path}: {wrong}; the weights must belong to the config.json beside them")
    return list(sources.values())


def _fill(path: Path, into: np.ndarray, source: _Source) -> int:
    """Write a stored tensor into its place; returns the bytes read."""
    values = source.tensor.read()
    with np.errstate(over="ignore"):  # an overflow is reported below, by name
        names.copy_into(into, names.to_ours(values, source.name, source.slot))
    if not np.isfinite(into).all():
        raise WeightsError(
            f"{path}: {source.name} is not finite in {into.dtype}; the file is damaged or needs a wider dtype"
        )
    return values.nbytes


def _put(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        array = jax.device_put(host)
    else:
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    # Transfers run on; unless each is awaited, the host keeps every leaf whose transfer is pending.
    return array.block_until_ready()
