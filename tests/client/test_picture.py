"""A message's picture against the split in one process; messages that no server would send."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megjax.client import largest_message_bytes, silence, viewer
from megjax.errors import MegError, WireFormatError
from megjax.link import wire
from megjax.link.counts import partition_sizes
from megjax.pipeline.split import send

RATIOS = (0.0, 0.4, 0.9)


@pytest.fixture(scope="module")
def decode(device):
    return jax.jit(lambda z: jnp.clip(device.decoder(device.params, z)[0], 0, 1))


@pytest.mark.parametrize("psnr_db", [3.0, 15.0, np.inf])
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_picture_is_that_of_the_split_in_one_process(decode, show, latent, message, ratio, psnr_db):
    seed = 11
    key_link = jax.random.split(jax.random.key(seed))[1]
    received = send(key_link, latent, jnp.float32(ratio), jnp.float32(psnr_db))
    expected = decode(received.z_BxHxWxC)
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(show(message(seed, ratio), seed, psnr_db), expected, atol=2e-5)


class Glass(NamedTuple):
    """A decoder that shows the latent's first values as they are, small enough that nothing is clipped."""

    config: Any

    def __call__(self, params, z_BxHxWxC):
        return 0.5 + 1e-3 * z_BxHxWxC[..., :3]


@pytest.mark.parametrize("psnr_db", [0.0, 10.0, 20.0])
def test_noise_has_the_power_that_its_psnr_says(device, message, psnr_db):
    look = viewer(device._replace(decoder=Glass(device.decoder.config)))
    sent = message(0, 0.0)
    clean, noisy = look(sent, 0, np.inf), look(sent, 0, psnr_db)
    power = np.mean(((noisy - clean) / 1e-3) ** 2) / wire.decode(sent).power
    # 768 draws: a deviation of 5 % is one standard deviation.
    assert 10 * np.log10(power) == pytest.approx(-psnr_db, abs=0.7)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 2.0**-8), ("int8", 0.5 / 127)])
def test_other_dtypes_differ_by_their_rounding(device, message, dtype, most):
    look = viewer(device._replace(decoder=Glass(device.decoder.config)))
    exact, rounded = (look(message(0, 0.4, kind), 0, np.inf) / 1e-3 for kind in ("float16", dtype))
    largest = np.abs(wire.decode(message(0, 0.4)).features_MxD).max()
    # float16's own rounding, and float32's of 0.5 + 1e-3 z.
    slack = 2.0**-11 * largest + 2e-4
    assert 0.1 * most * largest < np.abs(exact - rounded).max() <= most * largest + slack


def test_every_message_fits_what_is_read(device, message):
    most = largest_message_bytes(device)
    sizes = [len(message(0, ratio)) for ratio in np.linspace(0, 15 / 16, 31)]
    assert max(sizes) <= most <= max(sizes) + 64
    assert len(silence(device)) <= most


@pytest.mark.parametrize(("grid", "values"), [((4, 8), 16), ((8, 8), 12), ((1, 1), 1)])
def test_pictures_of_another_size_are_refused(show, grid, values):
    sources, _ = partition_sizes(grid)
    other = wire.encode(
        np.zeros((grid[0] * grid[1], values), np.float32),
        [(np.zeros(sources, bool), np.zeros(sources, np.int32))],
        grid=grid,
        ratio=0.0,
        key_data=np.zeros(2, np.uint32),
    )
    with pytest.raises(MegError, match="this decoder shows 8 x 8 of 16"):
        show(other, 0, 10.0)


@pytest.fixture(scope="module")
def originals(message):
    return [message(0, ratio, dtype) for ratio in RATIOS for dtype in ("float16", "bfloat16", "int8")]


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_broken_messages_are_refused_or_shown(show, originals, sealed, data):
    broken = bytearray(data.draw(st.sampled_from(originals)))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "header", "cut", "add", "number"]))
        if kind == "cut":
            del broken[data.draw(st.integers(0, len(broken))) :]
        elif kind == "add":
            broken += data.draw(st.binary(min_size=1, max_size=40))
        elif broken:
            last = min(31, len(broken) - 1) if kind != "flip" else len(broken) - 1
            place = data.draw(st.integers(0, last))
            if kind == "number":
                new = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\0\0\x80\x7f", b"\0\0\xc0\x7f"]))
                broken[place : place + 4] = new
            else:
                broken[place] = data.draw(st.integers(0, 255))
    broken = bytes(broken)
    if data.draw(st.booleans()) and len(broken) >= wire.HEADER_BYTES:
        broken = sealed(broken)
    try:
        picture = show(broken, 0, data.draw(st.sampled_from([-100.0, 10.0, np.inf])))
    except MegError:
        pass
    else:
        assert picture.shape == (64, 64, 3)
        assert np.isfinite(picture).all()
        assert 0 <= picture.min() <= picture.max() <= 1


def test_features_beyond_the_decoder_are_told(show, message, sealed):
    sent = bytearray(message(0, 0.0, "bfloat16"))
    features = np.frombuffer(bytes(sent[32:]), np.uint16).copy()
    features[:] = 0x7F7F  # the largest finite bfloat16
    sent[32:] = features.tobytes()
    with pytest.raises(MegError, match="not finite"):
        show(sealed(bytes(sent)), 0, -100.0)


def test_a_flipped_bit_is_noticed(show, message):
    sent = message()
    for place in range(0, len(sent), 97):
        with pytest.raises(WireFormatError):
            show(sent[:place] + bytes([sent[place] ^ 4]) + sent[place + 1 :], 0, 10.0)
