"""A bounded queue before one worker: requests of one kind and size leave it in batches."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megjax.errors import MegError


class Refused(Exception):
    """A request that is not served: the status, one line, and when to come again."""

    def __init__(self, status: int, reason: str, retry_after_s: int | None = None):
        super().__init__(reason)
        self.status, self.reason, self.retry_after_s = status, reason, retry_after_s


@dataclass(eq=False)
class Job:
    """A request that waits, and its answer.

    Args:
        kind: jobs of equal kind may share a batch.
        work: what the worker is given.
        answer: set by the batcher; cancelled by whoever no longer waits for it.
    """

    kind: Hashable
    work: Any
    answer: asyncio.Future[Any]
    arrived_s: float = field(default_factory=time.monotonic)


RESTART_S = 5
"""Retry-After of a server that is shutting down; seconds."""

Work = Callable[[Sequence[Job], int], Awaitable[Sequence[Any]]]
"""(jobs, batch size) -> each job's answer, or the exception that it is refused with."""


class Batcher:
    """The queue.

    Args:
        work: runs one batch.
        batch_sizes: that can be run.
        most: jobs that may wait.
        linger_s: how long an idle worker waits for a batch to fill.
    """

    def __init__(self, work: Work, batch_sizes: Sequence[int], most: int, linger_s: float):
        self.waiting: deque[Job] = deque()
        self.running = 0
        self.draining = False
        self.seconds: dict[int, float] = {size: float(size) for size in sorted(batch_sizes)}
        """What a batch of each size takes at most, measured; before that as if rows ran one by one."""
        self._work, self._most, self._linger_s = work, most, linger_s
        self._changed = asyncio.Event()

    def admit(self) -> None:
        """Find room for one job more.

        Raises:
            Refused: 503 while draining, 429 when the queue is full.
        """
        if self.draining:
            raise Refused(503, "the server is shutting down; ask again", RESTART_S)
        if len(self.waiting) >= self._most:
            raise Refused(429, f"{self._most} requests wait already; ask again later", self.retry_after_s())

    def submit(self, kind: Hashable, work: Any) -> Job:
        """Queue a job; see `admit` for what it raises."""
        self.admit()
        job = Job(kind, work, asyncio.get_running_loop().create_future())
        self.waiting.append(job)
        self._changed.set()
        return job

    def leave(self, job: Job) -> None:
        """Wait for a job's answer no longer."""
        job.answer.cancel()
        if job in self.waiting:
            self.waiting.remove(job)
        self._changed.set()

    def retry_after_s(self) -> int:
        """Seconds until the queue has likely moved on; at least 1."""
        fastest_s = min(seconds / size for size, seconds in self.seconds.items())
        return max(1, min(60, round(len(self.waiting) * fastest_s)))

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._until(lambda: bool(self.waiting))
            if len(self.waiting) < max(self.seconds):
                await asyncio.sleep(self._linger_s)
            jobs, size = self._take()
            if jobs:
                await self._serve(jobs, size)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing more, finish what waits; after the timeout refuse the rest and finish what runs."""
        self.draining = True
        self._changed.set()
        try:
            await asyncio.wait_for(self._until(lambda: not self.waiting and not self.running), timeout_s)
        except TimeoutError:
            refused, self.waiting = self.waiting, deque()
            for job in refused:
                settle(job.answer, Refused(503, "the server is shutting down; ask again", RESTART_S))
            await self._until(lambda: not self.running)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _take(self) -> tuple[list[Job], int]:
        """The next jobs of the first one's kind, and the batch size that serves most of them a second."""
        if not self.waiting:
            return [], 0
        kind = self.waiting[0].kind
        alike = [job for job in self.waiting if job.kind == kind][: max(self.seconds)]
        size = min(self.seconds, key=lambda size: self.seconds[size] / min(size, len(alike)))
        jobs = alike[:size]
        for job in jobs:
            self.waiting.remove(job)
        return jobs, size

    async def _serve(self, jobs: list[Job], size: int) -> None:
        self.running = len(jobs)
        try:
            answers = await self._work(jobs, size)
        except Exception as error:
            answers = [error] * len(jobs)
        finally:
            self.running = 0
            self._changed.set()
        for job, answer in zip(jobs, answers, strict=True):
            settle(job.answer, answer)


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Give an answer, unless nobody waits for it any more."""
    if future.done():
        return
    if isinstance(answer, MegError):
        answer = Refused(422, str(answer))
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
