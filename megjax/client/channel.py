"""The device's link: the throughput that it measures, and a channel emulated where a network is too good."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax

from megjax.errors import MegError
from megjax.link import channel as link
from megjax.link.wire import HEADER_BYTES

Emulated: TypeAlias = Literal["paper"]
"""Channels that can be emulated: paper draws a distance, 200 to 300 m, for every frame."""
Clock: TypeAlias = Callable[[], float]
Sleep: TypeAlias = Callable[[float], Awaitable[None]]

PIECE_BYTES = 256
"""An emulated channel hands on no more at once, so that a body's rate can be measured."""
SHORTEST_S = 1e-3
"""Time between a body's first and last piece that can be told from none."""


@dataclass(frozen=True)
class Channel:
    """What one message meets on its way.

    Args:
        rate_bps: of the message's body; the header is free, as in the latency model. Bit/s.
        psnr_db: of its features, which white Gaussian noise is added to; `inf` adds none.
        latency_s: before its first bit, t0.

    Raises:
        MegError: a rate that is not above 0, a latency below 0, either infinite, a PSNR below -100 dB.
    """

    rate_bps: float
    psnr_db: float = 10.0
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.rate_bps < math.inf:
            raise MegError(f"rate_bps {self.rate_bps}: must be a number above 0")
        if not self.psnr_db >= -100:
            raise MegError(f"psnr_db {self.psnr_db}: from -100 dB to inf, a perfect channel, are allowed")
        if not 0 <= self.latency_s < math.inf:
            raise MegError(f"latency_s {self.latency_s}: must be a number from 0 on")


def emulated(
    name: Emulated,
    seed: int,
    *,
    distance_m: float | None = None,
    psnr_db: float = 10.0,
    latency_s: float = 0.0,
) -> Channel:
    """Return one frame's channel: the rate of Eq. (4) at a distance ES-UE.

    Args:
        name: see `Emulated`.
        seed: of the frame; draws the distance, U[200, 300] m, where none is given.
        distance_m: in metres.
        psnr_db: of the features.
        latency_s: t0, which the paper leaves out.

    Raises:
        MegError: no such channel, a distance outside [1, 100000] m; see `Channel`.
    """
    if name not in get_args(Emulated):
        raise MegError(f"channel {name!r}: choose from {', '.join(get_args(Emulated))}")
    if distance_m is None:
        # Neither the noise's key, nor the link's, which both halves of split(key(seed)) are.
        key = jax.random.fold_in(jax.random.key(seed), 2)
        distance_m = float(link.sample_distance_m(key, link.DEFAULT_LINK))
    if not 1 <= distance_m <= 1e5:
        raise MegError(f"distance_m {distance_m}: from 1 to 100000 m are allowed")
    return Channel(float(link.rate_bps(link.snr(distance_m))), psnr_db, latency_s)


async def paced(
    pieces: AsyncIterator[bytes],
    channel: Channel,
    clock: Clock = time.monotonic,
    sleep: Sleep = asyncio.sleep,
) -> AsyncIterator[bytes]:
    """Hand a message on no faster than the channel: byte n at t0 + 8 (n - header) / rate, or when it is in.

    Args:
        pieces: of the message, as the network gives them.
        channel: the emulated one.
        clock: in seconds.
        sleep: waits.
    """
    start, passed = clock(), 0
    async for piece in pieces:
        for i in range(0, len(piece), PIECE_BYTES):
            part = piece[i : i + PIECE_BYTES]
            passed += len(part)
            due = start + channel.latency_s + 8 * max(passed - HEADER_BYTES, 0) / channel.rate_bps
            if (wait := due - clock()) > 0:
                await sleep(wait)
            yield part


class Throughput(NamedTuple):
    """What a device knows of its link from the messages that it received."""

    bits: float = 0.0
    seconds: float = 0.0

    @property
    def rate_bps(self) -> float | None:
        """Bit/s; None while nothing was measured."""
        return self.bits / self.seconds if self.seconds > 0 else None


NOTHING_KNOWN = Throughput()


def observed(past: Throughput, bits: int, seconds: float, weight: float = 0.5) -> Throughput:
    """Add one message to what is known; every older one then counts `weight` times what it did.

    A message says nothing unless it came in several pieces: the bits after the first over the time since
    then, as the first may have waited, and the request with it. Less than a millisecond counts as one: the
    bits lay in a buffer, and the link is at least so fast.

    Args:
        past: what is known.
        bits: that arrived after the first piece.
        seconds: between the first and the last piece.
        weight: of the past.
    """
    if bits <= 0:
        return past
    return Throughput(weight * past.bits + bits, weight * past.seconds + max(seconds, SHORTEST_S))
