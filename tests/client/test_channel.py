"""The emulated channel against Eq. (4), the throughput measured through it, and what is kept of it."""

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megjax.client import Channel, Throughput, emulated, recall, remember
from megjax.client.channel import observed, paced
from megjax.client.http import _collect
from megjax.errors import MegError


class Clock:
    """Time that passes only where something waits."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    async def sleep(self, seconds):
        self.now_s += seconds


async def pieces_of(message, size, clock=None, each_s=0.0):
    for i in range(0, len(message), size):
        if clock is not None:
            await clock.sleep(each_s)
        yield message[i : i + size]


def received(message, channel, size=700, each_s=0.0):
    """The message, the seconds that it took, and what was measured."""
    clock = Clock()

    async def run():
        pieces = paced(pieces_of(message, size, clock, each_s), channel, clock, clock.sleep)
        return await _collect(pieces, 10**6, clock)

    got, bits, seconds = asyncio.run(run())
    return got, clock.now_s - 100.0, observed(Throughput(), bits, seconds)


@given(
    size=st.integers(32, 9000),
    rate_bps=st.floats(1e3, 1e8),
    latency_s=st.floats(0, 3),
    piece=st.integers(1, 4000),
)
def test_a_message_takes_latency_and_its_bits_over_the_rate(size, rate_bps, latency_s, piece):
    message = np.random.default_rng(size).bytes(size)
    got, seconds, known = received(message, Channel(rate_bps, 10.0, latency_s), piece)
    assert got == message
    # Eq. (4): the header's 32 bytes are not charged.
    assert seconds == pytest.approx(latency_s + 8 * (size - 32) / rate_bps, rel=1e-6, abs=1e-9)
    if size >= 2000 and rate_bps < 1e6 and piece > 100:
        assert known.rate_bps == pytest.approx(rate_bps, rel=0.05)


def test_a_network_slower_than_the_channel_sets_the_pace():
    message = bytes(5000)
    _, seconds, known = received(message, Channel(1e6), size=500, each_s=0.1)
    assert seconds == pytest.approx(1.0, rel=0.01)
    assert known.rate_bps == pytest.approx(8 * 500 / 0.1, rel=0.15)


def test_the_papers_channel_has_the_rates_of_its_distances():
    # 35.3 + 37.6 log10 d dB against 30 + 94 dBm over 1 MHz, by hand.
    def rate(distance):
        return 1e6 * math.log2(1 + 10 ** ((30 + 94 - 35.3 - 37.6 * math.log10(distance)) / 10))

    for distance in (200.0, 250.0, 300.0):
        assert emulated("paper", 0, distance_m=distance).rate_bps == pytest.approx(rate(distance), rel=1e-3)
    rates = [emulated("paper", seed).rate_bps for seed in range(12)]
    assert rate(300) <= min(rates) < max(rates) <= rate(200)
    assert len(set(rates)) == 12
    assert emulated("paper", 3) == emulated("paper", 3)
    assert emulated("paper", 0).psnr_db == 10


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Channel(0.0), "rate_bps 0.0"),
        (lambda: Channel(math.inf), "rate_bps inf"),
        (lambda: Channel(math.nan), "rate_bps nan"),
        (lambda: Channel(1e6, math.nan), "psnr_db nan"),
        (lambda: Channel(1e6, -101.0), "-100 dB to inf"),
        (lambda: Channel(1e6, 10.0, -1.0), "latency_s -1.0"),
        (lambda: emulated("paper", 0, distance_m=0.5), "from 1 to 100000 m"),
        (lambda: emulated("paper", 0, distance_m=math.nan), "from 1 to 100000 m"),
    ],
)
def test_impossible_channels_are_refused(make, text):
    with pytest.raises(MegError, match=text):
        make()


def test_throughput_follows_the_link_and_ignores_what_says_nothing():
    known = observed(Throughput(), 0, 0.0)
    assert known.rate_bps is None
    for _ in range(8):
        known = observed(known, 10_000, 0.01)
    assert known.rate_bps == pytest.approx(1e6)
    for _ in range(4):
        known = observed(known, 10_000, 0.1)
    assert known.rate_bps == pytest.approx(1e5, rel=0.1)
    # All at once: a bound, not infinity.
    assert observed(Throughput(), 8000, 0.0).rate_bps == pytest.approx(8e6)


def test_measurements_outlive_the_process_for_ten_minutes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recall("http://a").rate_bps is None
    remember("http://a", Throughput(1e6, 2.0), now_s=1000.0)
    remember("http://b", Throughput(5e6, 1.0), now_s=1001.0)
    remember("http://c", Throughput(), now_s=1001.0)
    assert recall("http://a", now_s=1500.0) == Throughput(1e6, 2.0)
    assert recall("http://b", now_s=1500.0).rate_bps == 5e6
    assert recall("http://c", now_s=1500.0).rate_bps is None
    assert recall("http://a", now_s=1601.0).rate_bps is None
    # Clocks that were set back, and files that others wrote.
    assert recall("http://a", now_s=900.0).rate_bps is None
    for text in (
        "",
        "[]",
        '{"http://a": 3}',
        '{"http://a": {"bits": -1, "seconds": 1, "at_s": 1500}}',
        "[" * 10**5,
    ):
        (tmp_path / "megjax" / "links.json").write_text(text)
        assert recall("http://a", now_s=1500.0).rate_bps is None
    remember("http://a", Throughput(1e6, 2.0), now_s=1500.0)
    assert recall("http://a", now_s=1500.0).rate_bps == 5e5
    assert [path.name for path in (tmp_path / "megjax").iterdir()] == ["links.json"]
    # Where nothing can be written, nothing is kept.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "megjax" / "links.json"))
    remember("http://a", Throughput(1e6, 2.0), now_s=1500.0)
    assert recall("http://a", now_s=1500.0).rate_bps is None
