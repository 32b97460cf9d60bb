"""Figures of a load test: latency, throughput, memory."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eval.load.drive import Outcome, Sample
from megjax.files import write_file

INK, FAINT, TEAL, AMBER, BLUE = "#1f2630", "#c9d0d9", "#2a9d8f", "#b8700a", "#2f6fb7"
PERCENTILES = (50, 90, 95, 99)


def figures(outcomes: Sequence[Outcome], samples: Sequence[Sample], took_s: float) -> dict[str, Any]:
    """Numbers of a load test: what was answered, how fast, and how the server's memory grew."""
    answered = [outcome for outcome in outcomes if outcome.message is not None]
    latency_s = np.array([outcome.seconds for outcome in answered])
    memory = growth(samples, len(outcomes))
    return {
        "requests": len(outcomes),
        "answered": len(answered),
        "refused": dict(Counter(outcome.refused for outcome in outcomes if outcome.refused)),
        "tries": sum(outcome.tries for outcome in answered),
        "took_s": round(took_s, 2),
        "pictures_per_s": round(len(answered) / took_s, 3),
        "latency_s": {f"p{p}": round(float(np.percentile(latency_s, p)), 4) for p in PERCENTILES}
        | {"mean": round(float(latency_s.mean()), 4), "max": round(float(latency_s.max()), 4)}
        if len(answered)
        else None,
        "batches": {str(k): v for k, v in sorted(Counter(outcome.batch for outcome in answered).items())},
        "memory": memory,
    }


def growth(samples: Sequence[Sample], requests: int) -> dict[str, float] | None:
    """The server's resident memory over its last tenth of the requests against that over the second tenth.

    The first tenth is left out: buffers and caches fill up.
    """
    early = [s.resident_bytes for s in samples if 0.1 * requests <= s.done <= 0.2 * requests]
    late = [s.resident_bytes for s in samples if s.done >= 0.9 * requests]
    if not early or not late:
        return None
    before, after = float(np.median(early)), float(np.median(late))
    return {
        "early_mb": round(before / 1e6, 2),
        "late_mb": round(after / 1e6, 2),
        "peak_mb": round(max(s.resident_bytes for s in samples) / 1e6, 2),
        "growth": round(after / before - 1, 5),
    }


def draw(numbers: dict[str, Any], outcomes: Sequence[Outcome], samples: Sequence[Sample]) -> bytes:
    """A PNG: how many were answered within which time, throughput, memory."""
    style: dict[Any, Any] = {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
    }
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}
    answered = [outcome for outcome in outcomes if outcome.message is not None]
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        latency_s = np.sort([outcome.seconds for outcome in answered])
        left.plot(
            latency_s, 100 * np.arange(1, len(latency_s) + 1) / max(len(latency_s), 1), color=TEAL, lw=1.8
        )
        for percentile, name, height in ((50, "p50", 50), (95, "p95", 30), (99, "p99", 12)):
            if len(latency_s):
                value = numbers["latency_s"][name]
                left.plot([value, value], [0, percentile], color=FAINT, lw=1)
                left.annotate(
                    f"{name} {value:.3g} s",
                    (value, height),
                    xytext=(-4, 0),
                    ha="right",
                    va="center",
                    textcoords="offset points",
                    fontsize=8,
                )
        left.set(xlabel="from request to message, s", ylabel="answered, %", ylim=(0, 102), xlim=(0, None))
        left.set_title("Latency", loc="left", fontweight="bold")
        ends = np.sort([outcome.start_s + outcome.seconds for outcome in answered])
        if len(ends):
            edges = np.linspace(0, ends[-1], 31)
            rate = np.histogram(ends, edges)[0] / np.diff(edges)
            middle.stairs(rate, edges, color=BLUE, fill=True, alpha=0.25)
            middle.stairs(rate, edges, color=BLUE, lw=1.4)
        middle.set(xlabel="time, s", ylabel="pictures a second", ylim=(0, None), xlim=(0, None))
        middle.set_title("Throughput", loc="left", fontweight="bold")
        right.plot([s.done for s in samples], [s.resident_bytes / 1e6 for s in samples], color=AMBER, lw=1.8)
        right.set(xlabel="requests", ylabel="server's memory, MB", xlim=(0, None))
        right.set_ylim(0, 1.15 * max((s.resident_bytes / 1e6 for s in samples), default=1.0))
        right.set_title("Memory", loc="left", fontweight="bold")
        for axes in (left, middle, right):
            axes.grid(color=FAINT, lw=0.5, alpha=0.6)
            axes.set_axisbelow(True)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def save(folder: Path, numbers: dict[str, Any], picture: bytes) -> None:
    """Write both files, each beside its place and then renamed."""
    write_file(folder / "load.json", json.dumps(numbers, indent=2))
    write_file(folder / "load.png", picture)
