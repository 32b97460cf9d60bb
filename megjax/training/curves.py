"""Training curves from the logs that `megjax.training.loop.fit` writes."""

from __future__ import annotations

import json
from pathlib import Path

from megjax.errors import MegError
from megjax.files import replacing


def draw_curves(folder: Path, names: tuple[str, ...], output: Path) -> None:
    """Draw the loss of each stage against its steps, side by side, as PNG.

    Args:
        folder: holds `NAME.jsonl`.
        names: of the stages.
        output: the picture.

    Raises:
        MegError: if a log is missing.
    """
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise MegError(f"{path}: no such log; train this stage first")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        records = [line for line in lines if "loss" in line]  # the others are events and evaluations
        axes.plot([r["step"] for r in records], [r["loss"] for r in records])
        axes.set(title=name, xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
