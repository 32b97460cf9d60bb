"""What a run tells: lines for the user, JSONL, TensorBoard, pictures, speed and a progress bar."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megjax import flops
from megjax.data.pictures import to_uint8
from megjax.errors import MegError
from megjax.files import replacing, write_file
from megjax.training.step import Step, TrainState


class Report(NamedTuple):
    """What an evaluation in the middle of a run finds.

    Args:
        scalars: by name.
        pictures: by name, such as a grid of samples; in [0, 1].
    """

    scalars: Mapping[str, float]
    pictures: Mapping[str, Float[np.ndarray, "H W 3"]] = {}


class Work(NamedTuple):
    """What a step does, to tell its speed by.

    Args:
        images: a step.
        flops: of the model, a step, on all devices together; 0 if nobody counted.
        peak_flops_per_s: of all devices together; 0 if unknown.
    """

    images: int = 0
    flops: float = 0.0
    peak_flops_per_s: float = 0.0

    def speed(self, steps_per_s: float) -> dict[str, float]:
        """Steps, images and FLOPs a second, as far as they are known; `flop_utilisation` is at most 1."""
        known = {"steps_per_s": steps_per_s}
        if self.images:
            known["images_per_s"] = self.images * steps_per_s
        if self.flops:
            known["tflops_per_s"] = self.flops * steps_per_s / 1e12
        if self.flops and self.peak_flops_per_s:
            known["flop_utilisation"] = self.flops * steps_per_s / self.peak_flops_per_s
        return known


PEAK_FLOPS_PER_S = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "A40": 149.7e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""Of one device, dense bfloat16, by a part of its name; data sheets."""


def peak_flops_per_s() -> float:
    """The peak of this process's first device, 0 if unknown."""
    name = jax.local_devices()[0].device_kind
    found = [part for part in PEAK_FLOPS_PER_S if re.search(rf"\b{part}\b", name)]
    return PEAK_FLOPS_PER_S[max(found, key=len)] if found else 0.0


def counted_work(step: Step, state: TrainState, inputs: Any, images: int, peak: float = 0.0) -> Work:
    """A step's images and FLOPs; these are counted only where the devices' peak is known.

    Args:
        step: the update, without rematerialisation.
        state: shapes of the training state.
        inputs: shapes of what the loss is given.
        images: a step.
        peak: FLOP/s of one device; 0 looks it up by the device's name.
    """
    peak = (peak or peak_flops_per_s()) * jax.device_count()
    if not peak:
        return Work(images)
    return Work(images, flops.count(step, state, jax.random.key(0), inputs).flops, peak)


class Logs(NamedTuple):
    """Where a run's records go; on every process but the first, nowhere.

    Args:
        rewind: takes the records after a step out of the JSONL; a run that goes on there writes them anew.
        record: one line of JSONL, and TensorBoard's scalars.
        report: an evaluation: its scalars, and its pictures as PNG.
        say: a line for the user, on stderr and as an `event` of the JSONL.
        progress: (steps done, note): moves the bar.
    """

    rewind: Callable[[int], None]
    record: Callable[[int, Mapping[str, Any]], None]
    report: Callable[[int, Report], None]
    say: Callable[[str], None]
    progress: Callable[[int, str], None]


def _nowhere(*_: Any) -> None:
    pass


SPEED_OVER_S = 3600.0
"""The time left follows from the speed over so many seconds: lines may be minutes apart."""


@contextlib.contextmanager
def open_logs(folder: Path, name: str, steps: int, *, tensorboard: bool = False) -> Iterator[Logs]:
    """Open `NAME.jsonl`, TensorBoard's `tensorboard/NAME`, `NAME-pictures` and a progress bar.

    Args:
        folder: exists.
        name: of the run.
        steps: in all.
        tensorboard: write for TensorBoard too.

    Raises:
        MegError: TensorBoard is wanted, and tensorboardX is not installed.
    """
    if jax.process_index() != 0:
        yield Logs(*[_nowhere] * len(Logs._fields))
        return
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        path = folder / f"{name}.jsonl"
        file = path.open("a")
        stack.callback(lambda: file.close())
        board = summary_writer()(str(folder / "tensorboard" / name)) if tensorboard else None
        if board is not None:
            stack.callback(board.close)
        bar = stack.enter_context(Progress(*columns, console=console, speed_estimate_period=SPEED_OVER_S))
        task = bar.add_task(name, total=steps, note="")

        def rewind(step: int) -> None:
            nonlocal file
            file.close()
            write_file(path, "".join(_until(path, step)))
            file = path.open("a")

        def write(values: Mapping[str, Any]) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        def record(step: int, values: Mapping[str, Any]) -> None:
            write({"step": step, **values})
            if board is not None:
                for key, value in values.items():
                    board.add_scalar(f"{name}/{key}", value, step)

        def report(step: int, found: Report) -> None:
            record(step, found.scalars)
            for key, picture_HxWx3 in found.pictures.items():
                save_png(folder / f"{name}-pictures" / f"{key}-{step:08d}.png", picture_HxWx3)
                if board is not None:
                    board.add_image(f"{name}/{key}", to_uint8(picture_HxWx3), step, dataformats="HWC")

        def say(text: str) -> None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            write({"time": time.time(), "event": text})

        def progress(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield Logs(rewind, record, report, say, progress)


def _until(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text().splitlines():
        # The line at which a run was killed is none.
        with contextlib.suppress(ValueError):
            if json.loads(line).get("step", 0) <= step:
                yield line + "\n"


def save_png(path: Path, picture_HxWx3: Float[np.ndarray, "H W 3"]) -> None:
    """Write a picture in [0, 1], first beside its place."""
    with replacing(path) as temporary:
        Image.fromarray(to_uint8(picture_HxWx3)).save(temporary, format="PNG")


def summary_writer() -> Any:
    """TensorBoard's writer; raises `MegError` if tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise MegError("tensorboardX is not installed; `pip install 'megjax[train]'`") from None
    return SummaryWriter
