"""The loop around a training step: resume, progress, logs, evaluation, checkpoints."""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Key

from megjax.checks import LARGEST_SEED, within
from megjax.errors import MegError
from megjax.training.checkpoints import (
    Position,
    open_checkpoints,
    require_room,
    restore,
    save,
    save_failure,
    seal,
)
from megjax.training.logs import Logs, Report, Work, open_logs, summary_writer
from megjax.training.placing import place_batch, place_key
from megjax.training.processes import together
from megjax.training.sharding import check_batch, replicated
from megjax.training.step import Inputs, Share, Step, TrainState, scalars

BAD_STEPS = 10
"""So many steps in a row without a finite loss and gradient end a run."""

BatchAt = Callable[[int], Any]
"""The batch of a step number: a pure function, so that a resumed run is the same run."""

Evaluate = Callable[[TrainState], Report]
"""Called every so many steps, on every process: sample grids, errors on held-out data."""


@runtime_checkable
class Batches(Protocol):
    """An endless iterator over batches that can say where it stands, such as Grain's."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> Any:
        """Where it stands, in JSON's types."""
        ...

    def set_state(self, state: Any) -> None:
        """Go there."""
        ...


def fit(
    step: Step,
    state: TrainState,
    *,
    key: Key[Array, ""],
    steps: int,
    folder: Path,
    name: str,
    batch_at: BatchAt | None = None,
    batches: Batches | None = None,
    frozen: Any = None,
    mesh: Mesh | None = None,
    every: int = 100,
    checkpoint_every: int = 500,
    keep: int = 2,
    best: str = "loss",
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    work: Work | None = None,
    tensorboard: bool = False,
    sigterm_code: int = 0,
) -> TrainState:
    """Train until `steps` updates are done, resuming from the newest whole checkpoint in `folder/name`.

    A resumed run is the same run, bit for bit on the same devices. SIGTERM saves and exits.

    Args:
        step: the update, see `megjax.training.step.make_step`.
        state: the initial state, used up; its structure and shardings are what a checkpoint is restored to.
        key: the run's key; each step folds in its number.
        steps: updates in all.
        folder: holds `name/` (checkpoints), `name.jsonl` (the log) and `name-pictures/`.
        name: of the thing being trained.
        batch_at: where batches come from; or
        batches: the same as an iterator, whose position is part of the checkpoints.
        frozen: parameters that the loss needs beside those that it trains: it is given `Inputs` then.
        mesh: that the state lies on; each process then gives its part of a batch.
        every: steps between log lines; at least 1.
        checkpoint_every: steps between checkpoints; at least 1.
        keep: the last so many checkpoints are kept, and the best; at least 1.
        best: name of the metric that is lowest in the best checkpoint; of the evaluation, or of training.
        evaluate: looks at the state now and then.
        evaluate_every: steps between evaluations, 0 for one at the end; only a checkpoint on the step of an
            evaluation, or of a log line for a metric of training, can be the best.
        work: what a step does, for the speed that is shown.
        tensorboard: write for TensorBoard too.
        sigterm_code: the exit code of a run that SIGTERM ended.

    Returns:
        The final state.

    Raises:
        MegError: a number below its least; the folder cannot take the checkpoints; they are damaged, all of
            them, or another model's; loss or gradient was not finite for 10 steps in a row.
    """
    if (batch_at is None) == (batches is None):
        raise MegError("fit: give one of batch_at and batches")
    for argument, value, least in (
        ("every", every, 1),
        ("checkpoint_every", checkpoint_every, 1),
        ("keep", keep, 1),
        ("evaluate_every", evaluate_every, 0),
    ):
        if value < least:
            raise MegError(f"{argument} {value}: must be at least {least}")
    if jax.process_index() == 0:
        require_room(folder / name, state, keep + 2)
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(open_logs(folder, name, steps, tensorboard=tensorboard))
        manager = stack.enter_context(open_checkpoints(folder / name, logs.say, keep=keep, best=best))
        asked_to_stop = stack.enter_context(_sigterm())
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
            key = place_key(key, mesh)
        position = Position()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        if manager.all_steps():
            # The memory may not hold two states.
            jax.tree.map(lambda x: x.delete(), state)
        if restored := restore(manager, like, logs.say, with_data=batches is not None):
            state, position, _ = restored
            if batches is not None:
                batches.set_state(position.data)
        first = int(state.step)
        logs.rewind(first)
        logs.progress(first, "")

        update: Any = _compiled(step, state, mesh)
        window = _Window({})
        flags: deque[tuple[int, Any]] = deque()
        saving = False
        for i in range(first, steps):
            local = batch_at(i) if batch_at is not None else next(batches)  # type: ignore[arg-type]
            batch = local if mesh is None else place_batch(local, mesh)
            given = batch if frozen is None else Inputs(batch, frozen)
            if i == first and jax.process_count() > 1:
                # Collectives wait half a minute for each other, and no compiler takes the same time twice.
                update = update.lower(state, key, given).compile()
                together("compiled")
            state, metrics = update(state, key, given)
            window = _added(window, metrics)
            done, stop = i + 1, asked_to_stop(i + 1)
            end = stop or done == steps
            save_now = end or done % checkpoint_every == 0
            # Of this step alone: what an earlier one was found to be is no merit of the state saved here.
            found: dict[str, float] = {}

            flags.append((i, metrics.get("skipped", 0.0)))
            # The flag of a step is read while the next one runs, unless something is wrong or is to be saved.
            while len(flags) > (0 if position.in_a_row or save_now else 1):
                position = _count(position, *flags.popleft(), logs)
            if position.in_a_row >= BAD_STEPS:
                _give_up(folder / f"{name}.failed", state, local, key)
            if done % every == 0 or end:
                window, found = _flushed(window, work or Work())
                logs.record(done, found)
                logs.progress(done, _note(found))
            if evaluate is not None and (done == steps or (evaluate_every and done % evaluate_every == 0)):
                report = evaluate(state)
                logs.report(done, report)
                found |= report.scalars
                window = window._replace(since=None)  # not the steps' time
            if saving and not manager.is_saving_in_progress():
                seal(manager)
                saving = False
            if save_now:
                position = position._replace(data=None if batches is None else batches.get_state())
                save(manager, done, state, position, {k: float(v) for k, v in found.items()})
                saving = True
            if stop and done < steps:
                manager.wait_until_finished()
                seal(manager)
                command = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
                logs.say(f"stopped at step {done} of {steps}, which is saved; to resume: {command}")
                raise SystemExit(sigterm_code)
    return state


def check_run(config: Any, mesh: Mesh, name: str, state: TrainState) -> None:
    """Refuse before the data is read, which may take days, what would be refused after.

    Args:
        config: a trainer's, with `fit`'s numbers, `folder`, `seed`, `batch` and `accumulate`.
        mesh: that the state is to lie on.
        name: of the thing being trained.
        state: its shapes.

    Raises:
        MegError: see `fit` and `check_batch`; a seed that is none, no tensorboardX where it is wanted.
    """
    within(config, 1, math.inf, "every", "checkpoint_every", "keep")
    within(config, 0, math.inf, "evaluate_every")
    within(config, 0, LARGEST_SEED, "seed")
    within(config, 0, 255, "sigterm_code")
    check_batch(config.batch, config.accumulate, mesh)
    if config.tensorboard:
        summary_writer()
    if jax.process_index() == 0:
        require_room(config.folder / name, state, config.keep + 2)


def _compiled(step: Step, state: TrainState, mesh: Mesh | None) -> Step:
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    # What comes out lies where it lay, whatever the compiler would prefer.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _count(position: Position, step: int, skipped: Any, logs: Logs) -> Position:
    if not float(np.asarray(skipped)):
        return position._replace(in_a_row=0)
    position = position._replace(skipped=position.skipped + 1, in_a_row=position.in_a_row + 1)
    logs.say(
        f"step {step}: loss or gradient is not finite; no update ({position.in_a_row} in a row, "
        f"{position.skipped} in all)"
    )
    return position


def _give_up(folder: Path, state: TrainState, batch: Any, key: Key[Array, ""]) -> NoReturn:
    save_failure(folder, state, batch, key)
    raise MegError(
        f"step {int(state.step) - 1}: loss or gradient was not finite for {BAD_STEPS} steps in a row; the "
        f"step's state, batch and key are in {folder}. Lower the learning rate, or look at the batch"
    )


class _Window(NamedTuple):
    """What has been done since the last log line.

    Args:
        sums: of the metrics.
        count: steps in `sums`.
        timed: steps since `since`.
        since: when the clock was started; None before the first step, which compiles, is done.
    """

    sums: dict[str, Any]
    count: int = 0
    timed: int = 0
    since: float | None = None


def _added(window: _Window, metrics: dict[str, Any]) -> _Window:
    sums = jax.tree.map(jnp.add, window.sums, metrics) if window.sums else metrics
    if window.since is None:
        jax.block_until_ready(sums)
        return _Window(sums, window.count + 1, 0, time.perf_counter())
    return window._replace(sums=sums, count=window.count + 1, timed=window.timed + 1)


def _flushed(window: _Window, work: Work) -> tuple[_Window, dict[str, float]]:
    """Return an empty window; the metrics' means over steps with an update, if any, and the speed."""
    sums = dict(window.sums)
    skipped = float(np.asarray(sums.pop("skipped", 0.0)))
    updates = window.count - skipped
    # A share has its own count of samples.
    means = {k: v if isinstance(v, Share) else v / updates for k, v in sums.items()} if updates else {}
    means = scalars(means) | {"skipped": skipped}
    now = time.perf_counter()
    if window.timed and window.since is not None:
        means |= work.speed(window.timed / (now - window.since))
    return _Window({}, since=now), means


def _note(means: dict[str, float]) -> str:
    shown = {
        "loss": "loss {:.4g}",
        "steps_per_s": "{:.3g} steps/s",
        "images_per_s": "{:.3g} images/s",
        "flop_utilisation": "{:.1%} of peak FLOP/s",
    }
    return ", ".join(text.format(means[name]) for name, text in shown.items() if name in means)


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Yield a function of the step number: was the run asked to end? All processes get the same answer."""
    if jax.process_count() > 1:
        # JAX's own service listens to the signal, and agrees on a step with the others.
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda _: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
