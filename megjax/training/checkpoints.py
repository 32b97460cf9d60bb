"""Checkpoints of a run: asynchronous, atomic, checked before they are trusted; the last and the best stay.

Orbax writes them beside their place and renames. Of each finished one a manifest lies beside it, `STEP.json`:
its files' sizes and, of small ones, checksums. What no longer agrees with its manifest, or cannot be read, is
moved to `damaged/`, and the run goes on from the checkpoint before.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Key, PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from megjax.errors import MegError
from megjax.files import write_file
from megjax.training.processes import together
from megjax.training.step import TrainState

Say = Callable[[str], None]
"""Tells the user something worth a line."""

CHECKSUM_BYTES = 1 << 20
"""Files up to this size are compared by checksum too; for the others Orbax's own must do."""


_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors of the system that tell of what is stored; all others may be over at the next start."""


class NoCheckpointLeft(MegError):
    """All of a run's checkpoints are damaged."""


class Position(NamedTuple):
    """Where a run stands beside its state; saved as JSON.

    Args:
        data: what the batches' iterator says of itself, see `megjax.training.loop.Batches`.
        skipped: steps without an update in all, because loss or gradient was not finite.
        in_a_row: of these, the last ones without a finite one between.
    """

    data: dict[str, Any] | None = None
    skipped: int = 0
    in_a_row: int = 0


START = Position()


class Restored(NamedTuple):
    """What a run goes on from."""

    state: Any
    """Of the structure that was asked for."""
    position: Position
    step: int


def require_room(folder: Path, state: TrainState, copies: int) -> None:
    """Find a disk too small and a folder that cannot be written before any work is done.

    Args:
        folder: of the checkpoints; made if need be.
        state: what a checkpoint holds.
        copies: checkpoints that lie there at the same time, at most.

    Raises:
        MegError: saying what is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MegError(
            f"{folder}: cannot be written ({error.strerror}); choose another --folder or mend it"
        ) from None
    need = copies * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    replaced = (file for step in _steps(folder) for file in step.rglob("*") if file.is_file())
    have = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in replaced)
    if have < need:
        raise MegError(
            f"{folder}: {copies} checkpoints need {need / 1e9:.3g} GB, there is room for {have / 1e9:.3g}; "
            "free some or choose another --folder"
        )


def claim(folder: Path, name: str, what: Mapping[str, Any]) -> None:
    """Note beside a run's checkpoints what their numbers mean, and refuse a run that means something else.

    Checkpoints tell shapes alone: another flow's, another teacher's or another scale's would go on as if
    they were this run's, and be exported as such.

    Args:
        folder: of the run.
        name: of what is trained; the note is `NAME.run.json`, the checkpoints are in the folder `NAME`.
        what: by name; JSON values.

    Raises:
        MegError: the note says otherwise, or is none.
    """
    path, here = folder / f"{name}.run.json", json.loads(json.dumps(what))
    # Without checkpoints it is the note of a run that was refused before its first step.
    if path.exists() and _steps(folder / name):
        try:
            there = json.loads(path.read_text())
        except ValueError:
            raise MegError(f"{path}: not valid JSON; mend it, or choose another --folder") from None
        # A former version may have noted less.
        if wrong := sorted(name for name in there if here.get(name) != there[name]):
            name = wrong[0]
            raise MegError(
                f"{path}: its checkpoints are of {name} {there[name]}, this run is of {here.get(name)}; "
                "choose another --folder"
            )
    if jax.process_index() == 0:
        write_file(path, json.dumps(here, indent=2) + "\n")


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, say: Say, *, keep: int = 2, best: str | None = "loss"
) -> Iterator[ocp.CheckpointManager]:
    """Open a folder of checkpoints, moving damaged ones aside first.

    Args:
        folder: made if need be.
        say: told of each damaged one.
        keep: the last so many are kept, and one more, the best.
        best: name of the metric, given to `save`, that is lowest in the best; None keeps none for that.
    """

    def metric(metrics: dict[str, float]) -> float:
        value = metrics.get(best, math.inf) if best is not None else math.inf
        return value if math.isfinite(value) else math.inf

    kept: list[Any] = [LatestN(keep)]
    if best is not None:
        kept.append(BestN(get_metric_fn=metric, reverse=True, n=1, keep_checkpoints_without_metrics=False))

    if jax.process_index() == 0:
        for path in sorted(_steps(folder), key=lambda p: int(p.name)):
            if complaint := _complaint(path):
                _set_aside(path, complaint, say)
    together("checkpoints checked")
    options = ocp.CheckpointManagerOptions(
        best_fn=None if best is None else metric,
        best_mode="min",
        preservation_policy=AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
    )
    handler = ocp.StandardCheckpointHandler()
    with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler) as manager:
        yield manager
        manager.wait_until_finished()
        seal(manager)


def restore(
    manager: ocp.CheckpointManager, like: PyTree, say: Say, *, with_data: bool = False
) -> Restored | None:
    """Read the newest checkpoint that is whole; None if there has never been one.

    Args:
        manager: from `open_checkpoints`.
        like: its structure, shapes and shardings are what is restored, on whatever devices it was saved.
        say: told of each checkpoint that cannot be read.
        with_data: a checkpoint that does not tell the data's position is damaged.

    Raises:
        NoCheckpointLeft: none of them is whole.
        MegError: they are another model's, or the newest cannot be read for a reason that may pass.
    """
    folder = Path(manager.directory)
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            _compare(folder, _shapes(manager.item_metadata(step)), _shapes(like))
            state: Any = manager.restore(step, args=ocp.args.StandardRestore(like))
            position = Position(**(manager.metadata(step).custom_metadata or {}))
            if with_data and position.data is None:
                raise ValueError("it does not tell the data's position")
        except (MegError, jax.errors.JaxRuntimeError, MemoryError):  # another model; out of memory, say
            raise
        except Exception as error:  # whatever the damage makes Orbax raise
            if isinstance(error, OSError) and not isinstance(error, _DAMAGE):
                raise MegError(_unreadable(folder / str(step), error)) from None
            if jax.process_index() == 0:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
                _set_aside(folder / str(step), reason, say)
            together("checkpoint set aside")
            manager.reload()
            continue
        seal(manager)
        return Restored(state, position, step)
    if damaged := sorted(p.name for p in (folder / "damaged").glob("*")):
        raise NoCheckpointLeft(
            f"{folder}: no checkpoint is left; damaged are those of steps {', '.join(damaged)}. Move "
            "one back that is whole after all, or remove the folder to start anew"
        )
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): tuple(leaf.shape) for path, leaf in leaves}


def _compare(folder: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    if wrong := sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name)):
        name = wrong[0]
        raise MegError(
            f"{folder}: its checkpoints are another model's ({len(wrong)} arrays differ: {name} is "
            f"{found.get(name, 'absent')}, here {wanted.get(name, 'absent')}); choose another --folder"
        )


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: PyTree,
    position: Position = START,
    metrics: dict[str, float] | None = None,
) -> None:
    """Save in the background; returns once the state is copied from the devices.

    Args:
        manager: from `open_checkpoints`.
        step: after which it stands.
        state: a tree of arrays.
        position: where the run stands beside it.
        metrics: what `open_checkpoints` tells the best by.
    """
    manager.save(
        step,
        args=ocp.args.StandardSave(state),
        custom_metadata=position._asdict(),
        metrics=metrics,
    )


def seal(manager: ocp.CheckpointManager) -> None:
    """Write the manifests of the finished checkpoints that lack one, and remove those of deleted ones."""
    if jax.process_index() != 0:
        return
    folder = Path(manager.directory)
    steps = {path.name: path for path in _steps(folder)}
    for path in folder.glob("*.json"):
        if path.stem not in steps:
            path.unlink()
    for name, path in steps.items():
        if not (folder / f"{name}.json").exists():
            write_file(folder / f"{name}.json", json.dumps(_manifest(path), indent=1))


def save_failure(folder: Path, state: TrainState, batch: Any, key: Key[Array, ""]) -> None:
    """Keep all that repeats a step that went wrong: the state before it, its batch, the run's key.

    Args:
        folder: replaced if it exists.
        state: unchanged by the step but for its number.
        batch: of this process.
        key: the run's.
    """
    process = jax.process_index()
    if process == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        key_data = np.asarray(jax.random.key_data(key)).tolist()
        (folder / "step.json").write_text(json.dumps({"step": int(state.step) - 1, "key": key_data}))
    together("folder of the failure made")
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    arrays = {jax.tree_util.keystr(path) or "batch": np.asarray(leaf) for path, leaf in leaves}
    np.savez(folder / f"batch_{process}.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "state", state)


def _steps(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()]


def _manifest(step: Path) -> dict[str, list[int | None]]:
    """Size and, of small files, CRC-32 of each file below a checkpoint."""
    found = {}
    for path in sorted(p for p in step.rglob("*") if p.is_file()):
        size = path.stat().st_size
        checksum = zlib.crc32(path.read_bytes()) if size <= CHECKSUM_BYTES else None
        found[path.relative_to(step).as_posix()] = [size, checksum]
    return found


def _complaint(step: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; without one only reading it can tell."""
    path = step.parent / f"{step.name}.json"
    try:
        expected = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{path.name} is no manifest"
    try:
        found = _manifest(step)
    except OSError as error:
        raise MegError(_unreadable(step, error)) from None
    for name, values in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != values:
            return f"{name} has changed: {found[name][0]} bytes, written were {values[0]}"
    return None


def _unreadable(step: Path, error: OSError) -> str:
    return (
        f"{step}: cannot be read now ({error}); start again. If that stays so, move it away to go on from "
        "the one before"
    )


def _set_aside(step: Path, complaint: str, say: Say) -> None:
    """Move a damaged checkpoint to `damaged/`, where the last one of each step stays to be looked at."""
    target = step.parent / "damaged" / step.name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    step.rename(target)
    (step.parent / f"{step.name}.json").unlink(missing_ok=True)
    say(f"checkpoint {step} is damaged ({complaint}): moved to {target}; falling back to the one before")
