"""Flax's msgpack files, opened by their structure alone."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megjax.errors import WeightsError
from megjax.weights.stored import DTYPES, Tensor


class _Bytes(NamedTuple):
    """A run of bytes in a file, not read."""

    offset: int
    size: int


class _Array(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    runs: tuple[_Bytes, ...]


def tensors(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors by their path, seeking over the arrays' bytes.

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
        if (
            not all(isinstance(chunk, _Array) for chunk in chunks)
            or len({chunk.dtype for chunk in chunks}) != 1
        ):
            raise ValueError(f"{prefix}: chunks of several types, or none")
        return {prefix: _array(shape, chunks[0].dtype, tuple(run for chunk in chunks for run in chunk.runs))}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return flat


def _array(shape: tuple[int, ...], dtype: str, runs: tuple[_Bytes, ...]) -> _Array:
    if not isinstance(dtype, str) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {shape}, {dtype}")
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
    tag = _exactly(file, 1, end)[0]
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
        size = int.from_bytes(_exactly(file, width, end), "big", signed=kind == "int")
    else:
        raise ValueError(f"tag {tag:#x} at byte {file.tell() - 1}")
    if kind in ("int", "uint"):
        return size
    if kind == "str":
        return _exactly(file, size, end).decode()
    if kind == "list":
        return tuple(_decode(file, end) for _ in range(size))
    if kind == "map":
        return {_decode(file, end): _decode(file, end) for _ in range(size)}
    code = _exactly(file, 1, end)[0] if kind == "ext" else None
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


def _exactly(file: BinaryIO, size: int, end: int) -> bytes:
    # Asked first: `read` would set aside whatever a damaged size says.
    if file.tell() + size > end:
        raise ValueError("ends too early")
    return file.read(size)
