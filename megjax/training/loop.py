"""The loop around a training step: resume, progress, log, checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Key
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megjax.training.step import Step, TrainState

Log = Callable[[dict[str, Any]], None]


def fit(
    step: Step,
    state: TrainState,
    *,
    key: Key[Array, ""],
    steps: int,
    batch_at: Callable[[int], Any],
    folder: Path,
    name: str,
    every: int = 100,
    checkpoint_every: int = 500,
) -> TrainState:
    """Train until `steps` updates are done, resuming from the newest checkpoint in `folder/name`.

    Args:
        step: the update, see `megjax.training.step.make_step`.
        state: the initial state; its structure and shardings are what a checkpoint is restored to.
        key: the run's key; each step folds in its number, so that a resumed run is the same run.
        steps: updates in all.
        batch_at: the batch of a step number: a pure function, for the same reason.
        folder: holds `name/` (checkpoints) and `name.jsonl` (the log).
        name: of the thing being trained.
        every: steps between log lines.
        checkpoint_every: steps between checkpoints.

    Returns:
        The final state.
    """
    step = jax.jit(step, donate_argnums=0)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((folder / name).absolute(), options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
        first = int(state.step)
        columns = (
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        log_path = folder / f"{name}.jsonl"
        with Progress(*columns) as progress, log_path.open("a") as log:
            task = progress.add_task(name, total=steps, completed=first, note="")
            sums: dict[str, Any] = {}
            count, since = 0, time.perf_counter()
            for i in range(first, steps):
                state, metrics = step(state, key, batch_at(i))
                sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
                count += 1
                if (i + 1) % every == 0 or i + 1 == steps:
                    means = {k: float(np.asarray(v)) / count for k, v in sums.items()}
                    now = time.perf_counter()
                    record = {"step": i + 1, **means, "steps_per_s": count / (now - since)}
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    note = f"loss {means['loss']:.4g}, {record['steps_per_s']:.2f} steps/s"
                    progress.update(task, completed=i + 1, note=note)
                    sums, count, since = {}, 0, now
                if (i + 1) % checkpoint_every == 0 or i + 1 == steps:
                    manager.save(i + 1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    return state
