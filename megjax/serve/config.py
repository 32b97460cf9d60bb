"""How a server is set up, checked before anything is loaded."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from megjax.errors import MegError

LARGEST_BATCH = 64


@dataclass(frozen=True)
class ServeConfig:
    """An edge server.

    Args:
        host: address to listen on; off loopback a token is required.
        port: 0 takes a free one.
        token: bearer token that every route but `/healthz` asks for; None asks for none.
        policies: files from `train.policy`; the first that keeps a request's limits chooses.
        profile: hardware profile that latency and energy are charged by.
        tome_ratio: of the tokens merged inside the U-Net's self-attention.
        sizes: heights and widths that pictures may have, pixels; empty is the model's own.
        batch_sizes: compiled at start.
        max_steps: most denoising steps T of a request.
        queue: requests that may wait; one more is answered 429.
        linger_s: how long an idle server waits for a batch to fill.
        deadline_s: longest, and usual, time from a request to its answer.
        drain_s: after SIGTERM, how long what was accepted may take.
        body_bytes: of a request, at most.
        receive_s: for a client to send a request's head, and again its body.
        connections: open at once, at most.
        log_prompts: write prompts to the log.

    Raises:
        MegError: naming the value and what is allowed.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    policies: tuple[Path, ...] = ()
    profile: str = "paper"
    tome_ratio: float = 0.0
    sizes: tuple[tuple[int, int], ...] = ()
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    max_steps: int = 12
    queue: int = 64
    linger_s: float = 0.005
    deadline_s: float = 60.0
    drain_s: float = 60.0
    body_bytes: int = 16384
    receive_s: float = 10.0
    connections: int = 1024
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise MegError(f"port {self.port}: from 0 to 65535 are allowed")
        if self.token is not None and not (self.token and all("!" <= c <= "~" for c in self.token)):
            raise MegError("token: visible ASCII characters are allowed, no blanks, at least one")
        if self.token is None and not is_loopback(self.host):
            raise MegError(
                f"host {self.host}: others can reach it, so a token is required; set --token or MEGJAX_TOKEN"
            )
        sizes = self.batch_sizes
        if not sizes or min(sizes) < 1 or max(sizes) > LARGEST_BATCH or len(set(sizes)) < len(sizes):
            raise MegError(f"batch sizes {sizes}: different numbers from 1 to {LARGEST_BATCH} are allowed")
        for name in ("queue", "max_steps", "body_bytes", "connections"):
            if getattr(self, name) < 1:
                raise MegError(f"{name} {getattr(self, name)}: at least 1 is needed")
        for name in ("deadline_s", "drain_s", "receive_s"):
            if not 0 < getattr(self, name) <= 86400:
                raise MegError(f"{name} {getattr(self, name)}: above 0, up to a day is allowed")
        if not 0 <= self.tome_ratio <= 0.75:
            raise MegError(f"tome_ratio {self.tome_ratio}: from 0 to 0.75 are allowed")
        if not 0 <= self.linger_s <= 10:
            raise MegError(f"linger_s {self.linger_s}: from 0 to 10 s are allowed")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
