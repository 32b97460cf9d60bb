"""Writing a component's weights so that PyTorch's (or Flax's) diffusers and transformers load them."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from megjax.errors import MegError, WeightsError
from megjax.weights import formats, names
from megjax.weights.stored import DTYPES

_SAFETENSORS_SHARD_BYTES = 5_000_000_000


class _Item(NamedTuple):
    """One tensor to write: `leaf`, or its layer `slot.layer`."""

    name: str
    slot: names.Slot
    leaf: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.slot.shape) * self.leaf.dtype.itemsize


def save(
    folder: str | Path,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    format: formats.Format = "safetensors",
    max_shard_bytes: int | None = None,
) -> None:
    """Write one component's weights, with config.json beside; replaces what an earlier save left there.

    Args:
        folder: of the component, such as `unet`; made if need be.
        params: nested dict of float32, float16 or bfloat16 arrays, written as they are.
        config: what config.json shall hold; its class decides the file names: diffusers' or transformers'.
        format: `safetensors` in PyTorch's layout, or Flax's `msgpack`.
        max_shard_bytes: greatest size of one file; None is 5 GB for safetensors, and no limit for msgpack,
            since Flax diffusers reads no shards.

    Raises `MegError` for another dtype, and `WeightsError` if the folder holds weights in the other format,
    which a later load could take for these.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise MegError(f"max_shard_bytes: {max_shard_bytes}; must be at least 1, or None")
    if max_shard_bytes is None and format == "safetensors":
        max_shard_bytes = _SAFETENSORS_SHARD_BYTES
    library: formats.Library = "diffusers" if "_class_name" in config else "transformers"
    if library == "transformers" and "architectures" not in config:
        raise MegError("config: has neither _class_name (diffusers) nor architectures (transformers)")
    stem = formats.STEMS[format, library]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    other = "msgpack" if format == "safetensors" else "safetensors"
    if strange := sorted(folder.glob(f"*.{other}")):
        raise WeightsError(
            f"{strange[0]}: the folder holds weights in another format; remove them or choose another"
        )

    shards = _shards(_items(params, format), max_shard_bytes)
    count = len(shards)
    files = (
        [f"{stem}-{i:05}-of-{count:05}.{format}" for i in range(1, count + 1)]
        if count > 1
        else [f"{stem}.{format}"]
    )
    entry = f"{stem}.{format}.index.json" if count > 1 else files[0]
    # Temporary files lie in a folder of their own: what a crash leaves is never taken for weights.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        for file, shard in zip(files, shards, strict=True):
            _write(Path(scratch, file), shard, format, bool(config.get("use_linear_projection", False)))
        if count > 1:
            index = {
                "metadata": {"total_size": sum(item.nbytes for shard in shards for item in shard)},
                "weight_map": {
                    i.name: file for file, shard in zip(files, shards, strict=True) for i in shard
                },
            }
            _write_json(Path(scratch, entry), index)
        _write_json(Path(scratch, "config.json"), config)
        ours = re.compile(rf"{stem}(-\d+-of-\d+)?\.{format}(\.index\.json)?")
        old = [p for p in folder.iterdir() if ours.fullmatch(p.name)]
        # A whole file replaces a whole file in one step. Shards need several, so first the old entry goes: a
        # crash leaves a folder that does not load, never a mixture of two models.
        if count > 1:
            for path in (folder / f"{stem}.{format}", folder / entry):
                path.unlink(missing_ok=True)
        for file in dict.fromkeys([*files, "config.json", entry]):
            os.replace(Path(scratch, file), folder / file)
        for path in old:
            if path.name not in (entry, *files):
                path.unlink(missing_ok=True)


def _items(params: Mapping[str, Any], format: formats.Format) -> list[_Item]:
    leaves = names.flatten(params)
    for path, leaf in leaves.items():
        if leaf.dtype.name not in DTYPES:
            raise MegError(f"params: {'/'.join(path)} is {leaf.dtype}; allowed: {', '.join(DTYPES)}")
    layout = "torch" if format == "safetensors" else "flax"
    return [
        _Item(names.stored_name(name, slot, layout), slot, leaves[slot.path])
        for name, slot in names.slots(params).items()
    ]


def _shards(items: list[_Item], limit: int | None) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if limit is not None and shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _write(path: Path, shard: list[_Item], format: formats.Format, linear_projection: bool) -> None:
    layout: names.Layout = "torch" if format == "safetensors" else "flax"

    def values(item: _Item) -> np.ndarray:
        leaf = np.asarray(item.leaf)
        array = leaf if item.slot.layer is None else leaf[item.slot.layer, ...]
        view = names.to_stored(array, item.slot, layout, linear_projection=linear_projection)
        if view.flags.c_contiguous:
            return view
        copy = np.empty(view.shape, view.dtype)
        names.copy_into(copy, view)
        return copy

    if format == "safetensors":
        # safetensors lets nobody else read what it writes; a group's model is read by all of it.
        path.touch()
        mode = path.stat().st_mode
        # transformers asks the metadata whose layout this is.
        try:
            save_file({item.name: values(item) for item in shard}, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one, which is no OSError here
            raise WeightsError(f"{path}: cannot be written ({formats.first_line(error)})") from None
        path.chmod(mode)
        return
    tree = unflatten_dict({tuple(item.name.split("/")): item for item in shard})
    with path.open("wb") as file:
        for piece in _msgpack_pieces(tree, values):
            file.write(piece)


def _msgpack_pieces(tree: Mapping[str, Any], values: Any) -> Iterator[bytes]:
    """The bytes of `flax.serialization.msgpack_serialize(tree)`, with one array in memory at a time."""
    packer = msgpack.Packer(autoreset=True)
    yield packer.pack_map_header(len(tree))
    for key, node in tree.items():
        yield packer.pack(key)
        if isinstance(node, _Item):
            yield msgpack_serialize(values(node))
        else:
            yield from _msgpack_pieces(node, values)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
