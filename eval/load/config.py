"""What a load test does, within bounds."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
from pathlib import Path

import httpx

from megjax.checks import within
from megjax.errors import MegError


@dataclasses.dataclass(frozen=True)
class Config:
    """A load test.

    Args:
        requests: in all; at most 100000.
        clients: that ask at once; at most 512.
        distinct: different requests, drawn again and again.
        server: one that runs on this machine; one is started if none is given.
        token: of that server.
        model: `tiny`, or the server's own where one is given.
        steps: fewest and most of a request.
        batch_sizes: of the server that is started.
        queue: likewise.
        deadline_s: of each request; the server's own if not given.
        patience_s: how long a client tries again; 0 takes the first answer, an overload's refusals with it.
        psnr_db: of the features on each device's channel.
        seed: of what is asked for.
        most_s: the load ends after so long, done or not.
        out: where the figures go.
    """

    requests: int = 1000
    clients: int = 32
    distinct: int = 40
    server: str | None = None
    token: str | None = None
    model: str = "tiny"
    steps: tuple[int, int] = (4, 6)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    queue: int = 64
    deadline_s: float | None = None
    patience_s: float = 300.0
    psnr_db: float = 10.0
    seed: int = 0
    most_s: float = 3600.0
    out: Path = Path("load")

    def __post_init__(self) -> None:
        for name, most in (("requests", 100_000), ("clients", 512), ("distinct", 10_000)):
            if not 1 <= getattr(self, name) <= most:
                raise MegError(f"{name} {getattr(self, name)}: from 1 to {most} are allowed")
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise MegError(f"steps {self.steps}: give the fewest and the most")
        if not 0 < self.most_s <= 86400:
            raise MegError(f"most_s {self.most_s}: above 0, up to a day is allowed")
        within(self, 0, math.inf, "patience_s")
        within(self, -100, 200, "psnr_db")
        if not 0 <= self.seed < 2**32:
            raise MegError(f"seed {self.seed}: from 0 to {2**32 - 1} are allowed")
        if self.server is not None and not _here(self.server):
            raise MegError(f"server {self.server!r}: a load test runs against this machine alone, 127.0.0.1")


def _here(server: str) -> bool:
    """Whether an address is this machine's, by number: a name could lead anywhere."""
    try:
        return ipaddress.ip_address(httpx.URL(server).host).is_loopback
    except (ValueError, httpx.InvalidURL):
        return False
