"""The wire format: one message per picture, merged features and the map that unmerges them.

header, 32 bytes, little endian, not charged to the link
    0   version, 1
    1   flags: bits 0-1 dtype (float16, bfloat16, int8), bit 2 strip layout, bit 3 two rounds, the rest 0
    2   token rows, token columns, values of a token: three 16-bit integers
    8   merging ratio, float32; Eq. (16) gives the merged counts from it
    12  power, float32: mean square of the features as sent
    16  scale, float32: an int8 value's step; 0 for the other dtypes
    20  partition key, 8 bytes of threefry2x32 key data
    28  CRC-32 of all the other bytes
body, exactly the bits that `payload_bits` charges under `default`
    index map, bit-packed, most significant bit first, padded with zeros to a byte; for each round
        one bit a source: merged or not; left out when none or all merge
        ceil(log2 |B|) bits a merged source, in the sources' order: its destination
    features, row after row, little endian
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float, Float32, Integer, ScalarLike, UInt32

from megjax.errors import MegError, WireFormatError
from megjax.link.counts import Grid, Rounds, check_grid, clipped_counts, half, partition_sizes
from megjax.link.payload import destination_bits, side_information_bytes

WireDtype: TypeAlias = Literal["float16", "bfloat16", "int8"]
"""How a scalar travels: 16 or 8 bits; int8 with one scale a message."""
WireLayout: TypeAlias = Literal["patch", "strip"]
RoundMap: TypeAlias = tuple[Bool[np.ndarray, " _A"], Integer[np.ndarray, " _A"]]
"""One round: who merges, and each source's destination (an index into B), read where it merges."""

MEDIA_TYPE = "application/vnd.megjax.message"
RESULT_HEADER = "MegJAX-Result"
"""Of the answer that carries a message over HTTP: what was done, as JSON."""
VERSION = 1
HEADER_BYTES = 32
_HEADER = struct.Struct("<BBHHHfff8s")
_DTYPES = (np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16), np.dtype("i1"))
_NAMES: tuple[WireDtype, ...] = get_args(WireDtype)
_STRIP, _TWO_ROUNDS = 4, 8


class Message(NamedTuple):
    """A decoded message."""

    features_MxD: Float32[np.ndarray, "M D"]
    index_map: tuple[RoundMap, ...]
    grid: Grid
    layout: WireLayout
    ratio: float
    key_data: UInt32[np.ndarray, " words"]
    dtype: WireDtype
    power: float
    """Mean square of the features as sent: what the channel normalises them by."""


def encode(
    features_MxD: Float[np.ndarray, "M D"],
    index_map: Sequence[RoundMap],
    *,
    grid: Grid,
    ratio: ScalarLike,
    key_data: UInt32[np.ndarray, " words"],
    dtype: WireDtype = "float16",
    layout: WireLayout = "patch",
) -> bytes:
    """Write one message.

    Args:
        features_MxD: merged tokens, M = N - R rows without padding.
        index_map: who merges and where to, of one or two rounds.
        grid: token rows and columns.
        ratio: merging ratio in [0, 1]; the counts it gives must be the map's.
        key_data: the partition's threefry key.
        dtype: how scalars are sent.
        layout: how tokens make up the latent.

    Raises:
        MegError: features that are not finite, or do not fit `dtype` or the header's power; counts, shapes or
            sizes that disagree; an unknown `dtype` or `layout`.
    """
    check_grid(grid)
    for name, value, known in (("dtype", dtype, _NAMES), ("layout", layout, get_args(WireLayout))):
        if value not in known:
            raise MegError(f"{name} {value!r}: choose from {', '.join(known)}")
    if np.shape(key_data) != (2,):
        raise MegError(
            f"key data of shape {np.shape(key_data)}: the wire carries threefry2x32 keys, (2,); make one by "
            'jax.random.key(seed, impl="threefry2x32")'
        )
    rows, channels = features_MxD.shape
    rounds: Rounds = 2 if len(index_map) == 2 else 1
    ratio = np.float32(np.asarray(ratio))
    if len(index_map) != rounds or not 0 <= ratio <= 1:
        raise MegError(
            f"{len(index_map)} rounds at ratio {ratio}: need 1 or 2 rounds and a ratio from 0 to 1"
        )
    if max(*grid, channels) > 0xFFFF or channels < 1:
        raise MegError(f"grid {grid[0]} x {grid[1]} of {channels} values: each must be from 1 to 65535")
    counts = clipped_counts(ratio, grid, rounds)
    if rows != grid[0] * grid[1] - sum(counts):
        raise MegError(
            f"{rows} rows: ratio {ratio} leaves {grid[0] * grid[1] - sum(counts)}, pass them alone"
        )
    scale, sent_MxD = _quantise(features_MxD, dtype)
    values_MxD = sent_MxD.astype(np.float64) * (scale if dtype == "int8" else 1.0)
    power = np.mean(values_MxD**2)
    if power > np.finfo(np.float32).max:
        raise MegError(f"features of mean square {power:g}: at most 3.4e38 can be sent, scale them down")
    flags = _NAMES.index(dtype) | (_STRIP if layout == "strip" else 0) | (rounds - 1) * _TWO_ROUNDS
    header = _HEADER.pack(
        VERSION, flags, *grid, channels, ratio, power, scale, np.asarray(key_data, "<u4").tobytes()
    )
    body = _pack_map(index_map, counts, grid) + sent_MxD.tobytes()
    return header + struct.pack("<I", zlib.crc32(body, zlib.crc32(header))) + body


def decode(message: bytes) -> Message:
    """Read one message; nothing is allocated from its lengths before they are found true.

    Raises:
        WireFormatError: anything but the exact bytes that `encode` writes.
    """
    if len(message) < HEADER_BYTES:
        raise WireFormatError(f"message of {len(message)} bytes: the header alone has {HEADER_BYTES}")
    version, flags, h, w, channels, ratio, power, scale, key = _HEADER.unpack_from(message)
    if version != VERSION:
        raise WireFormatError(f"message of version {version}: this reader knows version {VERSION}")
    if flags > 15 or flags & 3 == 3:
        raise WireFormatError(f"flags {flags:#04x}: unknown bits or dtype")
    if not (h and w and channels and 0 <= ratio <= 1):
        raise WireFormatError(f"grid {h} x {w} of {channels} values, ratio {ratio}: not a picture's sizes")
    dtype, grid = _DTYPES[flags & 3], (h, w)
    rounds: Rounds = 2 if flags & _TWO_ROUNDS else 1
    counts = clipped_counts(np.float32(ratio), grid, rounds)
    rows, map_bytes = h * w - sum(counts), int(side_information_bytes(counts, grid))
    expected = HEADER_BYTES + map_bytes + rows * channels * dtype.itemsize
    if len(message) != expected:
        raise WireFormatError(f"message of {len(message)} bytes: its header tells of {expected}")
    body = memoryview(message)[HEADER_BYTES:]
    (checksum,) = struct.unpack_from("<I", message, _HEADER.size)
    if zlib.crc32(body, zlib.crc32(memoryview(message)[: _HEADER.size])) != checksum:
        raise WireFormatError(
            f"checksum {checksum:#010x} does not match the message: it was damaged on its way"
        )
    if not (
        np.isfinite([power, scale]).all() and power >= 0 and scale >= 0 and (scale == 0 or flags & 3 == 2)
    ):
        raise WireFormatError(
            f"power {power} and scale {scale}: must be finite and positive, scale for int8 only"
        )
    index_map = _unpack_map(body[:map_bytes], counts, grid)
    features_MxD = np.frombuffer(body[map_bytes:], dtype).reshape(rows, channels).astype(np.float32)
    if flags & 3 == 2:
        features_MxD *= np.float32(scale)
    if not np.isfinite(features_MxD).all():
        raise WireFormatError("features that are not finite: the sender's latent was broken")
    layout: WireLayout = "strip" if flags & _STRIP else "patch"
    key_data = np.frombuffer(key, "<u4").astype(np.uint32)
    return Message(features_MxD, index_map, grid, layout, ratio, key_data, _NAMES[flags & 3], power)


def _quantise(features_MxD: np.ndarray, dtype: WireDtype) -> tuple[np.float32, np.ndarray]:
    x = features_MxD.astype(np.float32)
    if not np.isfinite(x).all():
        raise MegError("features to send are not finite: NaN or infinity in the merged tokens")
    if dtype == "int8":
        # The smallest normal number keeps the quotient finite for an all but silent message.
        scale = np.float32(max(np.abs(x).max(initial=0) / 127, np.finfo(np.float32).tiny))
        return scale, np.rint(x / scale).clip(-127, 127).astype(np.int8)
    with np.errstate(over="ignore"):
        sent = x.astype(_DTYPES[_NAMES.index(dtype)])
    if not np.isfinite(sent.astype(np.float32)).all():
        raise MegError(
            f"feature of magnitude {np.abs(x).max():g} does not fit {dtype}: send int8 or scale it down"
        )
    return np.float32(0), sent


def _pack_map(index_map: Sequence[RoundMap], counts: tuple[int, ...], grid: Grid) -> bytes:
    bits = []
    for (merged_A, best_A), count in zip(index_map, counts, strict=True):
        sources, destinations = partition_sizes(grid)
        if merged_A.shape != (sources,) or best_A.shape != (sources,) or np.sum(merged_A) != count:
            raise MegError(
                f"index map of {merged_A.size} and {best_A.size} sources, {np.sum(merged_A)} merged: need "
                f"{sources} and {count}"
            )
        if merged_A.dtype != bool or not np.issubdtype(best_A.dtype, np.integer):
            raise MegError(f"index map of {merged_A.dtype} and {best_A.dtype}: give booleans and integers")
        chosen = best_A[merged_A]
        if count and not 0 <= chosen.min() <= chosen.max() < destinations:
            raise MegError(f"index map names destinations {chosen.min()} to {chosen.max()} of {destinations}")
        if 0 < count < sources:
            bits.append(merged_A)
        places = np.arange(destination_bits(destinations) - 1, -1, -1)
        bits.append(((chosen[:, None] >> places[None, :]) & 1).astype(bool).reshape(-1))
        grid = half(grid)
    return np.packbits(np.concatenate(bits)).tobytes()


def _unpack_map(data: memoryview, counts: tuple[int, ...], grid: Grid) -> tuple[RoundMap, ...]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).astype(bool)
    index_map: list[RoundMap] = []
    for count in counts:
        sources, destinations = partition_sizes(grid)
        merged_A = np.full(sources, count > 0)
        if 0 < count < sources:
            merged_A, bits = bits[:sources], bits[sources:]
            if np.count_nonzero(merged_A) != count:
                raise WireFormatError(
                    f"index map merges {np.count_nonzero(merged_A)} sources, the ratio {count}"
                )
        width = destination_bits(destinations)
        chosen = bits[: count * width].reshape(count, width) @ (1 << np.arange(width)[::-1])
        if count and chosen.max() >= destinations:
            raise WireFormatError(f"index map names destination {chosen.max()} of {destinations}")
        best_A = np.zeros(sources, np.int32)
        best_A[merged_A] = chosen
        index_map.append((merged_A, best_A))
        bits, grid = bits[count * width :], half(grid)
    if bits.any():
        raise WireFormatError("index map is padded with ones: not a message of this format")
    return tuple(index_map)
