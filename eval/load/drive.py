"""Clients that ask, and a server to be asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import NamedTuple

import httpx
import numpy as np

from eval.load.config import Config
from megjax.client import PictureRequest, connect, fetch
from megjax.data.grammar import COLOURS, RELATIONS, SHAPES
from megjax.errors import MegError

MEMORY = re.compile(r"^process_resident_memory_bytes (\S+)$", re.MULTILINE)
REST_S = 1.0
"""A client's pause after a refusal."""
REFUSED = re.compile(r"\((\d{3})\)|answers (\d{3})")


class Outcome(NamedTuple):
    """What became of one request."""

    which: int
    """Of the distinct ones."""
    start_s: float
    """Since the load began."""
    seconds: float
    """Until the message was there or the client gave up, tries and waits included."""
    batch: int
    """That the answer names; 0 without one."""
    message: bytes | None
    tries: int
    refused: str
    """A status, or what else it was; empty for an answer."""


class Sample(NamedTuple):
    """The server's memory at a time, and how many requests were over by then."""

    at_s: float
    resident_bytes: float
    done: int


def requests(config: Config) -> list[PictureRequest]:
    """Draw the distinct requests: two objects, seed, steps, ratio and guidance of their own."""
    random = np.random.default_rng(config.seed)

    def thing() -> str:
        colour = str(random.choice(COLOURS))
        return f"{'an' if colour == 'orange' else 'a'} {colour} {random.choice(SHAPES)}"

    return [
        PictureRequest(
            f"{thing()} {random.choice(RELATIONS)} {thing()}",
            seed=int(random.integers(2**32)),
            steps=int(random.integers(config.steps[0], config.steps[1] + 1)),
            ratio=round(float(random.uniform(0.0, 0.9)), 3),
            guidance=round(float(random.uniform(1.0, 5.0)), 2),
            deadline_s=config.deadline_s,
        )
        for _ in range(config.distinct)
    ]


@contextlib.contextmanager
def serving(config: Config) -> Iterator[str]:
    """A server's address: the one that is given, or one that is started and ended here.

    Raises:
        MegError: it does not start.
    """
    if config.server is not None:
        yield config.server
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from megjax.cli import main; main()", "serve", "--port", str(port)]
    command += ["--model", config.model, "--queue", str(config.queue), "--batch-sizes"]
    command += [str(size) for size in config.batch_sizes]
    env = {name: value for name, value in os.environ.items() if name != "MEGJAX_TOKEN"}
    if config.token is not None:
        env["MEGJAX_TOKEN"] = config.token
    server = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        with contextlib.suppress(httpx.HTTPError):
            asyncio.run(_until_ready(f"http://127.0.0.1:{port}", config.token, server))
        if server.poll() is not None:
            said = (server.stderr.read() if server.stderr else "").strip().splitlines()
            raise MegError(f"the server ended with code {server.returncode}: {said[-1] if said else ''}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            # What it says is read, or a full pipe would keep it from ending.
            server.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


async def _until_ready(address: str, token: str | None, server: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    async with connect(address, token) as http:
        while server.poll() is None and time.monotonic() - begun < 1800:
            with contextlib.suppress(httpx.TransportError):
                if (await http.get("readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.2)


async def drive(
    config: Config, address: str, asked: Sequence[PictureRequest], most_bytes: int
) -> tuple[list[Outcome], list[Sample], float]:
    """Send the load.

    Args:
        config: see there.
        address: of the server.
        asked: the distinct requests.
        most_bytes: of a message.

    Returns:
        What became of each request, the server's memory, and the seconds that it all took.
    """
    order = np.random.default_rng(config.seed + 1).integers(len(asked), size=config.requests)
    left = iter(order.tolist())
    outcomes: list[Outcome] = []
    samples: list[Sample] = []
    begun = time.monotonic()

    async def one(http: httpx.AsyncClient, which: int) -> Outcome:
        start = time.monotonic()
        batch, message, tries, refused = 0, None, 0, ""
        try:
            answer = await fetch(http, asked[which], most_bytes=most_bytes, patience_s=config.patience_s)
            batch, message, tries = int(answer.result["batch"]), answer.message, answer.tries
        except MegError as error:
            found = REFUSED.search(str(error))
            refused = (found[1] or found[2]) if found else str(error)
        now = time.monotonic()
        return Outcome(which, start - begun, now - start, batch, message, tries, refused)

    async def client(http: httpx.AsyncClient) -> None:
        for which in left:
            if time.monotonic() - begun > config.most_s:
                return
            outcomes.append(await one(http, which))
            if outcomes[-1].refused:
                # Whoever is refused and asks again at once measures the refusals alone.
                await asyncio.sleep(REST_S)

    async def watch(http: httpx.AsyncClient) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                found = MEMORY.search((await http.get("metrics")).text)
                if found:
                    samples.append(Sample(time.monotonic() - begun, float(found[1]), len(outcomes)))
            await asyncio.sleep(1.0)

    async with _client(config, address) as http:
        watching = asyncio.create_task(watch(http))
        await asyncio.gather(*(client(http) for _ in range(config.clients)))
        took_s = time.monotonic() - begun
        await asyncio.sleep(1.5)
        watching.cancel()
    return outcomes, samples, took_s


@contextlib.asynccontextmanager
async def _client(config: Config, address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(address, config.token) as http:
        http.timeout = httpx.Timeout(600.0, pool=None)
        yield http
