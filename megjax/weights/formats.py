"""Files of tensors, opened by their headers alone: safetensors and Flax's msgpack, whole or in shards."""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from megjax.errors import WeightsError

Format = Literal["safetensors", "msgpack"]
Library = Literal["diffusers", "transformers"]

STEMS: dict[tuple[Format, Library], str] = {
    ("safetensors", "diffusers"): "diffusion_pytorch_model",
    ("safetensors", "transformers"): "model",
    ("msgpack", "diffusers"): "diffusion_flax_model",
    ("msgpack", "transformers"): "flax_model",
}
DTYPES = {name: np.dtype(getattr(jnp, name)) for name in ("float32", "float16", "bfloat16")}
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensor(NamedTuple):
    """A stored tensor: what its header says, and how to read it.

    Args:
        shape: as stored.
        dtype: numpy's name, or the format's own if it's none of `DTYPES`.
        read: returns the values; raises `WeightsError` if the file is shorter than its header says.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file; for a dtype in `DTYPES`."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def find(folder: Path, variant: str | None = None) -> Path:
    """Return the folder's weights: a whole file or an index of shards, safetensors before msgpack.

    Args:
        folder: one component's, such as `unet`.
        variant: as in `model.fp16.safetensors`; None takes the plain file, or the folder's only variant.

    Raises `WeightsError` if there is none, if the variant isn't there or one must be named, and for PyTorch's
    pickles.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; expected a component in diffusers layout")
    found: dict[str | None, Path] = {}
    for (suffix, _), stem in STEMS.items():
        pattern = re.compile(
            rf"{stem}(?:\.(?P<whole>[\w-]+))?\.{suffix}|{stem}\.{suffix}\.index(?:\.(?P<index>[\w-]+))?\.json"
        )
        for path in sorted(folder.iterdir()):
            # A shard that belongs to an index is no file of its own.
            if (match := pattern.fullmatch(path.name)) and not re.search(r"-\d+-of-\d+\.", path.name):
                found.setdefault(match["whole"] or match["index"], path)
    if variant in found:
        return found[variant]
    if variant is None and len(found) == 1:
        return next(iter(found.values()))
    if found:
        there = ", ".join(sorted(name or "plain" for name in found))
        raise WeightsError(f"{folder}: no weights of variant {variant or 'plain'!r}; there are {there}")
    if pickles := sorted(p.name for pattern in ("*.bin", "*.ckpt", "*.pt") for p in folder.glob(pattern)):
        raise WeightsError(
            f"{folder / pickles[0]}: PyTorch pickles can run code when read, so they are refused; "
            "save the model with safe_serialization=True"
        )
    names = [f"{stem}.{suffix}" for (suffix, _), stem in STEMS.items()]
    raise WeightsError(f"{folder}: no weights; expected {' or '.join(names)}, or an index of its shards")


def tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a weights file, or of the shards that an index names, reading headers only."""
    if path.suffix != ".json":
        return _safetensors(path) if path.suffix == ".safetensors" else _msgpack(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise WeightsError(f"{path}: no weight_map from names to files")
    files = sorted(set(weight_map.values()))
    if outside := [name for name in files if Path(name).name != name]:
        raise WeightsError(f"{path}: shard {outside[0]!r} must lie in the index's own folder")
    if missing := [name for name in files if not (path.parent / name).is_file()]:
        raise WeightsError(f"{path}: {count(missing, 'shard')} missing: {first(missing)}")
    found: dict[str, Tensor] = {}
    for name in files:
        shard = tensors(path.parent / name)
        absent = [key for key, file in weight_map.items() if file == name and key not in shard]
        if absent or (shared := found.keys() & shard.keys()):
            wrong = (
                f"lacks {first(absent)}" if absent else f"repeats {first(sorted(shared))} of another shard"
            )
            raise WeightsError(f"{path.parent / name}: {wrong}; the shards don't belong to this index")
        found |= shard
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; raises `WeightsError` if it's missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def count(items: list[Any], noun: str) -> str:
    """Return `1 tensor`, `2 tensors`."""
    return f"{len(items)} {noun}{'s' * (len(items) != 1)}"


def first(items: list[str], limit: int = 4) -> str:
    """Return the first few items, and how many there are besides."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        # The mapped pages of a whole file would count as a second copy of the weights; `pread` keeps none.
        file = safe_open(path, framework="numpy", backend="pread")
        heads = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: truncated or not safetensors ({error})") from None

    def read(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path}: cannot read {name} ({error})") from None

    return {
        name: Tensor(
            tuple(head.get_shape()),
            _SAFETENSORS_DTYPES.get(str(head.get_dtype()), str(head.get_dtype())),
            functools.partial(read, name),
        )
        for name, head in heads.items()
    }


class _Bytes(NamedTuple):
    """A run of bytes in a file, not read."""

    offset: int
    size: int


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    runs: tuple[_Bytes, ...]


def _msgpack(path: Path) -> dict[str, Tensor]:
    """Read the structure of Flax's msgpack, seeking over the arrays' bytes.

    `msgpack.Unpacker` would read the whole file to tell the shapes, and copy each array three times.
    """
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            tree = _decode(file, end)
            if file.tell() != end:
                raise ValueError(f"{end - file.tell()} bytes too many")
        arrays = _flatten(tree)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"{path}: truncated or not Flax msgpack ({error})") from None

    def read(array: _Array) -> np.ndarray:
        buffer = np.empty(sum(run.size for run in array.runs), np.uint8)
        at = 0
        with path.open("rb") as file:
            for run in array.runs:
                file.seek(run.offset)
                at += file.readinto(buffer[at : at + run.size].data)
        if at != buffer.size:
            raise WeightsError(f"{path}: became shorter while it was read")
        return buffer.view(DTYPES[array.dtype]).reshape(array.shape)

    return {name: Tensor(a.shape, a.dtype, functools.partial(read, a)) for name, a in arrays.items()}


def _flatten(tree: Any, prefix: str = "") -> dict[str, _Array]:
    if isinstance(tree, _Array):
        return {prefix: tree}
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix or 'the file'} is no array")
    if "__msgpack_chunked_array__" in tree:  # how Flax stores an array of more than 1 GiB
        shape, chunks = (
            tuple(tree[part][str(i)] for i in range(len(tree[part]))) for part in ("shape", "chunks")
        )
        if len({chunk.dtype for chunk in chunks}) != 1:
            raise ValueError(f"{prefix}: chunks of several types")
        return {prefix: _array(shape, chunks[0].dtype, tuple(run for chunk in chunks for run in chunk.runs))}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return flat


def _array(shape: tuple[int, ...], dtype: str, runs: tuple[_Bytes, ...]) -> _Array:
    size = sum(run.size for run in runs)
    if dtype in DTYPES and size != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{size} bytes for an array of shape {shape}, {dtype}")
    return _Array(shape, dtype, runs)


# msgpack's tags: kind and number of bytes that hold the size, see https://github.com/msgpack/msgpack/blob/master/spec.md.
_SIZED = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xCC + i: ("uint", 1 << i) for i in range(4)},
    **{0xD0 + i: ("int", 1 << i) for i in range(4)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NDARRAY, _SCALAR = 1, 3  # Flax's extension types


def _decode(file: BinaryIO, end: int) -> Any:
    """Decode the object at the file's position; byte strings become `_Bytes`, arrays `_Array`."""
    tag = _exactly(file, 1)[0]
    if tag <= 0x7F or tag >= 0xE0:
        return tag if tag <= 0x7F else tag - 0x100
    if tag in _CONSTANTS:
        return _CONSTANTS[tag]
    if tag <= 0xBF:
        kind, size = (
            ("map", tag & 0xF) if tag <= 0x8F else ("list", tag & 0xF) if tag <= 0x9F else ("str", tag & 0x1F)
        )
    elif 0xD4 <= tag <= 0xD8:
        kind, size = "ext", 1 << (tag - 0xD4)
    elif tag in _SIZED:
        kind, width = _SIZED[tag]
        size = int.from_bytes(_exactly(file, width), "big", signed=kind == "int")
    else:
        raise ValueError(f"tag {tag:#x} at byte {file.tell() - 1}")
    if kind in ("int", "uint"):
        return size
    if kind == "str":
        return _exactly(file, size).decode()
    if kind == "list":
        return tuple(_decode(file, end) for _ in range(size))
    if kind == "map":
        return {_decode(file, end): _decode(file, end) for _ in range(size)}
    code = _exactly(file, 1)[0] if kind == "ext" else None
    start = file.tell()
    if start + size > end:
        raise ValueError(f"ends within {size} bytes that start at byte {start}")
    if kind == "bin":
        file.seek(start + size)
        return _Bytes(start, size)
    if code not in (_NDARRAY, _SCALAR):
        raise ValueError(f"extension type {code} at byte {start}")
    shape, dtype, run = _decode(file, end)
    if file.tell() != start + size or not isinstance(run, _Bytes):
        raise ValueError(f"a broken array at byte {start}")
    return _array(shape, dtype, (run,))


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise ValueError("ends too early")
    return data
