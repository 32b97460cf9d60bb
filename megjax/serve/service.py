"""A server's state, and a request's way through it: check, queue, batch, answer."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from megjax.errors import MegError
from megjax.link import profiles
from megjax.link.cost import Compute
from megjax.pipeline import Pipeline, Request, check
from megjax.pipeline.split import fewest_steps
from megjax.pipeline.workload import workload
from megjax.rl.policy import act, load_policy
from megjax.serve import engine
from megjax.serve.account import account
from megjax.serve.batching import Batcher, Job, Refused
from megjax.serve.choice import choose, covering
from megjax.serve.config import ServeConfig
from megjax.serve.engine import Sent, Size, Task
from megjax.serve.metrics import Metrics
from megjax.serve.picture import Shown, show
from megjax.serve.schemas import GenerateRequest

log = logging.getLogger("megjax.serve")


class Wanted(NamedTuple):
    """What the worker needs to know of a request."""

    task: Task
    limits: tuple[float, float] | None
    """Latency (s) and energy (kJ)."""
    rate_bps: float
    psnr_db: float
    picture: bool
    """Whether to run the device's half too."""


class Done(NamedTuple):
    """A request's answer."""

    sent: Sent
    result: dict[str, Any]
    shown: Shown | None


class Service:
    """One backbone, its queue and its worker thread, the only one that runs JAX.

    Args:
        pipeline: the backbone.
        config: see `ServeConfig`.

    Raises:
        MegError: a policy or profile that cannot be read, a size that cannot be generated.
    """

    def __init__(self, pipeline: Pipeline, config: ServeConfig):
        self.pipeline, self.config, self.metrics = pipeline, config, Metrics()
        own = pipeline.image_size, pipeline.image_size
        self.sizes: tuple[Size, ...] = config.sizes or (own,)
        self.policies = [load_policy(path) for path in config.policies]
        self.profile = profiles.load(config.profile)
        self.fewest_steps = fewest_steps(pipeline)
        if config.max_steps < self.fewest_steps:
            raise MegError(f"max_steps {config.max_steps}: this model takes at least {self.fewest_steps}")
        for path, policy in zip(config.policies, self.policies, strict=True):
            low, high = policy.info.min_steps, policy.info.max_steps
            if low < self.fewest_steps or high > config.max_steps:
                bounds = f"{self.fewest_steps} to {config.max_steps}"
                raise MegError(f"{path}: chooses {low} to {high} steps, this server takes {bounds}")
        for size in self.sizes:
            check(Request("-", steps=config.max_steps, height=size[0], width=size[1]), pipeline)
        self.batcher = Batcher(self._batch, config.batch_sizes, config.queue, config.linger_s)
        self.ready = False
        self._closed = False
        self._compute: dict[Size, Compute] = {}
        self._worker = ThreadPoolExecutor(1, "megjax-jax")
        self._reader = ThreadPoolExecutor(1, "megjax-text")
        self._ids = itertools.count(1)
        self._name = secrets.token_hex(4)
        metrics = self.metrics
        metrics.ready.set_function(lambda: float(self.ready and not self.batcher.draining))
        metrics.waiting.set_function(lambda: float(len(self.batcher.waiting)))
        metrics.running.set_function(lambda: float(self.batcher.running))

    async def run(self) -> None:
        """Compile everything, then serve until cancelled."""
        await asyncio.get_running_loop().run_in_executor(self._worker, self._warm)
        self.ready = True
        log.info("ready")
        await self.batcher.run()

    def close(self) -> None:
        """Let go of the threads; what runs in them is left to end."""
        self._closed = True
        for pool in (self._worker, self._reader):
            pool.shutdown(wait=False, cancel_futures=True)

    async def answer(
        self, body: GenerateRequest, gone: Callable[[], Awaitable[None]], *, picture: bool = False
    ) -> Done:
        """Generate what a request asks for.

        Args:
            body: the request.
            gone: returns once the client has left.
            picture: run the device's half too.

        Raises:
            Refused: with the status that tells why.
        """
        started, config = time.monotonic(), self.config
        deadline_s = min(body.deadline_s or config.deadline_s, config.deadline_s)
        if body.deadline_s is not None and body.deadline_s > config.deadline_s:
            raise Refused(422, f"deadline_s: at most {config.deadline_s:g} s are allowed")
        # Before any word is looked up: what is refused should cost little.
        self.batcher.admit()
        if not self.ready:
            raise Refused(503, "the server is starting; ask again", 2)
        wanted = await self._wanted(body, picture)
        name = f"{self._name}-{next(self._ids)}"
        if config.log_prompts:
            log.info("%s: prompt %r, negative prompt %r", name, body.prompt, body.negative_prompt)
        job = self.batcher.submit((wanted.task.size, picture), wanted)
        leaving = asyncio.ensure_future(gone())
        try:
            left_s = max(0.0, deadline_s - (time.monotonic() - started))
            await asyncio.wait({job.answer, leaving}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            late = not job.answer.done()
            self.batcher.leave(job)
        if late and leaving.done() and not leaving.cancelled():
            self.metrics.cancelled.labels("client left").inc()
            raise Refused(499, "the client left")
        if late:
            self.metrics.cancelled.labels("deadline").inc()
            raise Refused(504, f"not done within {deadline_s:g} s")
        done: Done = job.answer.result()
        result = {"id": name, **done.result}
        result["timings"] = {**done.result["timings"], "total_s": round(time.monotonic() - started, 6)}
        self._count(done, result)
        return done._replace(result=result)

    def _count(self, done: Done, result: dict[str, Any]) -> None:
        self.metrics.payload_bits.inc(done.sent.payload_bits)
        self.metrics.chosen.labels(result["chosen_by"]).inc()
        for part, seconds in result["timings"].items():
            self.metrics.parts.labels(part.removesuffix("_s")).observe(seconds)

    async def _wanted(self, body: GenerateRequest, picture: bool) -> Wanted:
        size = self.sizes[0] if body.height is None or body.width is None else (body.height, body.width)
        if size not in self.sizes:
            known = ", ".join(f"{height} x {width}" for height, width in self.sizes)
            raise Refused(422, f"height and width: this server makes {known}")
        limits = None
        if body.limits is not None:
            limits = body.limits.latency_s, body.limits.energy_j / 1000
            try:
                covering(self.policies, limits)
            except MegError as error:
                raise Refused(422, str(error)) from None
        elif body.steps is not None and not self.fewest_steps <= body.steps <= self.config.max_steps:
            most = self.config.max_steps
            raise Refused(422, f"steps: from {self.fewest_steps} to {most} are allowed")
        loop = asyncio.get_running_loop()
        try:
            task = await loop.run_in_executor(self._reader, self._task, body, size)
        except MegError as error:
            raise Refused(422, str(error)) from None
        psnr_db = float("inf") if body.channel.psnr_db is None else body.channel.psnr_db
        return Wanted(task, limits, body.channel.rate_bps, psnr_db, picture)

    def _task(self, body: GenerateRequest, size: Size) -> Task:
        chosen = body.steps is not None and body.ratio is not None
        request = Request(
            body.prompt,
            negative_prompt=body.negative_prompt,
            steps=body.steps if body.steps is not None else self.fewest_steps,
            ratio=body.ratio if body.ratio is not None else 0.0,
            guidance=body.guidance,
            seed=body.seed,
            height=size[0],
            width=size[1],
        )
        return engine.prepare(self.pipeline, request, body.dtype, chosen=chosen)

    async def _batch(self, jobs: Sequence[Job], size: int) -> Sequence[Any]:
        begun = time.monotonic()
        self.metrics.rows.observe(len(jobs))
        wanted = [job.work for job in jobs]
        abandoned = threading.Event()

        def watch(_: object) -> None:
            if all(job.answer.done() for job in jobs):
                abandoned.set()

        for job in jobs:
            job.answer.add_done_callback(watch)
        loop = asyncio.get_running_loop()
        answers = await loop.run_in_executor(self._worker, self._generate, wanted, size, abandoned)
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, Done):
                answer.result["timings"] = {
                    "queue_s": round(begun - job.arrived_s, 6),
                    **answer.result["timings"],
                }
        return answers

    def _generate(
        self, wanted: Sequence[Wanted], size: int, abandoned: threading.Event
    ) -> list[Done | Exception]:
        """Run a batch; in the worker thread."""
        if abandoned.is_set():
            return [Refused(504, "nobody waits")] * len(wanted)
        answers: list[Done | Exception] = [Refused(500, "not generated")] * len(wanted)
        tasks: dict[int, Task] = {}
        for i, each in enumerate(wanted):
            try:
                tasks[i] = each.task if each.limits is None else self._chosen(each)
            except MegError as error:
                answers[i] = error
        if not tasks:
            return answers
        sent, times = engine.messages(self.pipeline, list(tasks.values()), size, self.config.tome_ratio)
        for (i, task), message in zip(tasks.items(), sent, strict=True):
            if isinstance(message, MegError):
                answers[i] = message
                continue
            result = account(
                task,
                message,
                times,
                batch=size,
                chosen_by="request" if wanted[i].limits is None else "policy",
                compute=self._compute[task.size],
                rate_bps=wanted[i].rate_bps,
            )
            answers[i] = Done(message, result, None)
        if wanted[0].picture:
            self._show(wanted, tasks, answers, size)
        return answers

    def _show(
        self, wanted: Sequence[Wanted], tasks: dict[int, Task], answers: list[Done | Exception], size: int
    ) -> None:
        """Run the device's half for those that were generated, beside their references."""
        good = {i: answer for i, answer in enumerate(answers) if isinstance(answer, Done)}
        if not good:
            return
        each = [(tasks[i], done.sent.message, wanted[i].psnr_db) for i, done in good.items()]
        for (i, done), shown in zip(good.items(), show(self.pipeline, each, size), strict=True):
            answers[i] = shown if isinstance(shown, MegError) else done._replace(shown=shown)

    def _chosen(self, wanted: Wanted) -> Task:
        """Let the policy choose by the channel that the device reports."""
        assert wanted.limits is not None
        steps, ratio = choose(self.policies, wanted.limits, wanted.rate_bps)
        ratio = min(ratio, engine.largest_ratio(self.pipeline, wanted.task.size))
        return dataclasses.replace(wanted.task, steps=steps, ratio=ratio)

    def _warm(self) -> None:
        """Compile and time every batch size; in the worker thread."""
        for size in self.sizes:
            ratio = self.config.tome_ratio
            work = workload(self.pipeline, size, ratio)
            self._compute[size] = profiles.compute(self.profile, work, tome=ratio > 0)
            for batch in self.batcher.seconds:
                if self._closed:
                    return
                request = Request("", steps=self.fewest_steps, height=size[0], width=size[1])
                task = engine.blank(self.pipeline, request)
                start = time.perf_counter()
                self._generate([Wanted(task, None, 1e6, 10.0, True)], batch, threading.Event())
                text = "%d x %d, batch %d: compiled in %.1f s, takes %.3f s for %d steps"
                compiled_s = time.perf_counter() - start
                # The faster of two: another process may have had the processor.
                seconds = min(self._seconds([task] * batch) for _ in range(2))
                log.info(text, *size, batch, compiled_s, seconds, self.fewest_steps)
                if size == self.sizes[0]:
                    self.batcher.seconds[batch] = seconds * self.config.max_steps / self.fewest_steps
        for policy in self.policies:
            act(policy, 0.0)

    def _seconds(self, tasks: Sequence[Task]) -> float:
        start = time.perf_counter()
        engine.messages(self.pipeline, tasks, len(tasks), self.config.tome_ratio)
        return time.perf_counter() - start
