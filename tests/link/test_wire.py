"""The wire format: exact inverses, and nothing but the typed error for anything malformed."""

import struct
import tracemalloc
import zlib

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megjax.errors import MegError, WireFormatError
from megjax.link import wire
from megjax.link.counts import clipped_counts, half, partition_sizes
from megjax.link.payload import payload_bits


def random_message(seed, grid, channels, ratio, rounds, dtype, layout="patch"):
    """Return features, map and message of random content."""
    rng = np.random.default_rng(seed)
    counts, at, index_map = clipped_counts(np.float32(ratio), grid, rounds), grid, []
    for count in counts:
        sources, destinations = partition_sizes(at)
        merged = np.zeros(sources, bool)
        merged[rng.permutation(sources)[:count]] = True
        best = rng.integers(0, max(destinations, 1), sources).astype(np.int32)
        index_map.append((merged, best))
        at = half(at)
    features = rng.standard_normal((grid[0] * grid[1] - sum(counts), channels)).astype(np.float32)
    key = rng.integers(0, 2**32, 2, dtype=np.uint32)
    message = wire.encode(
        features, index_map, grid=grid, ratio=ratio, key_data=key, dtype=dtype, layout=layout
    )
    return features, index_map, key, message


def seal(message):
    """Recompute the checksum of a forged message."""
    body = message[wire.HEADER_BYTES :]
    return message[:28] + struct.pack("<I", zlib.crc32(body, zlib.crc32(message[:28]))) + body


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, 6),
    st.floats(0, 1, width=32),
    st.sampled_from([1, 2]),
    st.sampled_from(["float16", "bfloat16", "int8"]),
    st.sampled_from(["patch", "strip"]),
)
def test_decoder_undoes_encoder(grid, channels, ratio, rounds, dtype, layout):
    features, index_map, key, message = random_message(0, grid, channels, ratio, rounds, dtype, layout)
    read = wire.decode(message)
    assert (read.grid, read.layout, read.dtype, read.ratio) == (grid, layout, dtype, np.float32(ratio))
    np.testing.assert_array_equal(read.key_data, key)
    for (merged, best), (merged_read, best_read) in zip(index_map, read.index_map, strict=True):
        np.testing.assert_array_equal(merged_read, merged)
        np.testing.assert_array_equal(best_read[merged], best[merged])
    step = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.501 / 127}[dtype] * np.abs(features).max(
        initial=0
    )
    np.testing.assert_allclose(read.features_MxD, features, atol=step)
    np.testing.assert_allclose(read.power, np.mean(read.features_MxD**2), rtol=1e-4)
    if rounds == 2:
        bits = payload_bits(
            jnp.float32(ratio), grid[0] * grid[1], channels, 8 if dtype == "int8" else 16, grid=grid
        )
        assert 8 * (len(message) - wire.HEADER_BYTES) == bits
    if dtype != "int8":  # What is decoded encodes to the same bytes.
        assert message == wire.encode(
            read.features_MxD,
            read.index_map,
            grid=grid,
            ratio=ratio,
            key_data=key,
            dtype=dtype,
            layout=layout,
        )


def test_20000_mutations_are_refused_or_harmless():
    rng = np.random.default_rng(1)
    messages = [
        random_message(i, grid, 4, ratio, rounds, dtype)[-1]
        for i, (grid, ratio, rounds, dtype) in enumerate(
            [((8, 8), 0.4, 1, "float16"), ((8, 8), 0.9, 2, "int8"), ((7, 9), 0.6, 2, "bfloat16")]
        )
    ]
    originals = [wire.decode(m) for m in messages]
    refused = 0
    tracemalloc.start()
    for i in range(20000):
        which = i % 3
        message = bytearray(messages[which])
        match rng.integers(5):
            case 0:  # Bits flip.
                for at in rng.integers(0, 8 * len(message), rng.integers(1, 9)):
                    message[at // 8] ^= 1 << at % 8
            case 1:  # The end is lost.
                message = message[: rng.integers(0, len(message))]
            case 2:  # A stretch is overwritten.
                start, length = rng.integers(0, len(message)), rng.integers(1, 40)
                stretch = message[start : start + length]
                message[start : start + length] = rng.bytes(len(stretch))
            case 3:  # The header is noise.
                message[1:28] = rng.bytes(27)
            case _:  # All is noise, or more than was sent.
                message = bytearray(rng.bytes(rng.integers(0, 300))) if i % 2 else message + rng.bytes(9)
        try:
            read = wire.decode(bytes(message))
        except WireFormatError:
            refused += 1
        else:
            np.testing.assert_array_equal(read.features_MxD, originals[which].features_MxD)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6
    assert refused > 19900


def test_forged_messages_with_a_true_checksum_are_read_or_refused():
    rng = np.random.default_rng(2)
    *_, message = random_message(0, (6, 6), 3, 0.4, 1, "float16")
    outcomes = {True: 0, False: 0}
    tracemalloc.start()
    for _ in range(3000):
        forged = bytearray(message)
        for at in rng.integers(0, len(message), rng.integers(1, 4)):
            forged[at] = rng.integers(256)
        try:
            read = wire.decode(seal(bytes(forged)))
            assert np.isfinite(read.features_MxD).all()
            outcomes[True] += 1
        except WireFormatError:
            outcomes[False] += 1
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
    assert min(outcomes.values()) > 100


def forge(message, at, data):
    return seal(message[:at] + data + message[at + len(data) :])


@pytest.mark.parametrize(
    ("at", "data", "reason"),
    [
        (0, b"\x02", "version 2"),
        (1, b"\x03", "unknown bits or dtype"),
        (1, b"\x10", "unknown bits or dtype"),
        (2, b"\0\0", "not a picture's sizes"),
        (2, b"\xff\xff\xff\xff\xff\xff", "header tells of"),
        (8, struct.pack("<f", float("nan")), "not a picture's sizes"),
        (8, struct.pack("<f", 1.5), "not a picture's sizes"),
        (8, struct.pack("<f", 0.5), "header tells of"),
        (12, struct.pack("<f", float("inf")), "power inf"),
        (12, struct.pack("<f", -1.0), "power -1"),
        (16, struct.pack("<f", 1.0), "scale 1"),
        (32, b"\xff\xff\xff", "index map merges"),
        (-2, struct.pack("<e", float("nan")), "not finite"),
    ],
)
def test_every_malformed_field_is_named(at, data, reason):
    *_, message = random_message(0, (6, 6), 3, 0.4, 1, "float16")
    with pytest.raises(WireFormatError, match=reason):
        wire.decode(forge(message, at % len(message), data))


def test_destinations_out_of_range_and_ones_in_the_padding():
    # 27 sources, 9 destinations of 4 bits: 15 is none of them. All sources merge, so there is no mask.
    *_, message = random_message(0, (6, 6), 3, 0.75, 1, "float16")
    with pytest.raises(WireFormatError, match="destination 15 of 9"):
        wire.decode(forge(message, 32, b"\xff"))
    with pytest.raises(WireFormatError, match="padded with ones"):
        wire.decode(forge(message, 32 + 13, bytes([message[45] | 1])))


def test_senders_mistakes_are_named(monkeypatch):
    features, index_map, key, _ = random_message(0, (6, 6), 3, 0.4, 1, "float16")
    good = {"grid": (6, 6), "ratio": 0.4, "key_data": key}
    merged, best = index_map[0]
    for change, reason in (
        ({"ratio": 2.0}, "ratio from 0 to 1"),
        ({"grid": (6, 7)}, "22 rows: ratio 0.4"),
        ({"grid": (70000, 1)}, "from 1 to 65535"),
        ({"key_data": np.zeros(4, np.uint32)}, r"key data of shape \(4,\)"),
    ):
        with pytest.raises(MegError, match=reason):
            wire.encode(features, index_map, **(good | change))
    with pytest.raises(MegError, match="0 rounds"):
        wire.encode(features, [], **good)
    with pytest.raises(MegError, match="destinations 9 to 9 of 9"):
        wire.encode(features, [(merged, np.full_like(best, 9))], **good)
    with pytest.raises(MegError, match="27 and 27 sources, 27 merged: need 27 and 14"):
        wire.encode(features, [(np.ones_like(merged), best)], **good)
    with pytest.raises(MegError, match="26 and 27 sources"):
        wire.encode(features, [(merged[:-1], best)], **good)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(jaxtyping.config, "jaxtyping_disable", True)
        with pytest.raises(MegError, match="index map of bool and float64: give booleans and integers"):
            wire.encode(features, [(merged, best.astype(float))], **good)
    with pytest.raises(MegError, match="does not fit float16"):
        wire.encode(features + np.float32(7e4), index_map, **good)
    # Their square is beyond float32: a message of such features would say a power of infinity.
    for dtype in ("bfloat16", "int8"):
        with pytest.raises(MegError, match=r"mean square .*e\+38"):
            wire.encode(np.full_like(features, 3e19), index_map, **good, dtype=dtype)
    silent = wire.decode(wire.encode(0 * features, index_map, **good, dtype="int8"))
    assert not silent.features_MxD.any()
