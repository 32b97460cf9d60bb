"""Numbers as `results.json` holds them: each with its unit and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import scipy.stats
from jaxtyping import Float

Tag: TypeAlias = Literal["measured", "modelled", "calibrated", "paper", "setting"]
"""measured here; modelled from counts under a hardware profile and a channel; calibrated on the paper's own
numbers; the paper's; set by the preset."""
Record: TypeAlias = dict[str, Any]
"""What JSON holds."""


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval, or what it spans."""

    value: float
    low: float
    high: float


def span(values: Sequence[float] | Float[np.ndarray, " S"]) -> Interval:
    """Return the mean of a few seeds' values between the least and the greatest."""
    return Interval(float(np.mean(values)), float(np.min(values)), float(np.max(values)))


def number(value: float, tag: Tag, unit: str = "", *, timed: bool = False) -> Record:
    """Return a number's record; `timed` marks what a clock said, which no two runs share."""
    return {"value": float(value), "tag": tag, "unit": unit} | ({"timed": True} if timed else {})


def interval(found: Interval, tag: Tag, unit: str = "") -> Record:
    """Return the record of an estimate with its interval."""
    return number(found.value, tag, unit) | {"low": found.low, "high": found.high}


def mean(samples_P: Float[np.ndarray, " P"]) -> Interval:
    """Return the mean over pictures with its interval."""
    return _bootstrap((samples_P,), lambda x, axis: np.mean(x, axis=axis))


def ratio(top_P: Float[np.ndarray, " P"], bottom_P: Float[np.ndarray, " P"]) -> Interval:
    """Return the ratio of two means over the same pictures, resampled together."""
    return _bootstrap((top_P, bottom_P), lambda x, y, axis: np.mean(x, axis=axis) / np.mean(y, axis=axis))


def psnr(mse_P: Float[np.ndarray, " P"]) -> Record | None:
    """Return the PSNR of the mean MSE with its interval; None where nothing differs."""
    found = mean(mse_P)
    if found.low <= 0:
        return None
    value, high, low = (-10 * math.log10(x) for x in found)
    return interval(Interval(value, low, high), "measured", "dB")


def geometric(samples_P: Float[np.ndarray, " P"]) -> Record | None:
    """Return the geometric mean, which a few bad pictures do not decide; None where something is 0."""
    if samples_P.min() <= 0:
        return None
    return number(np.exp(np.mean(np.log(samples_P))), "measured")


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Any) -> Interval:
    value = float(statistic(*samples, axis=-1))
    found = scipy.stats.bootstrap(
        samples, statistic, paired=True, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def line(
    series: str,
    label: str,
    x: Sequence[float],
    y: Sequence[float | Interval],
    tag: Tag,
    **style: Any,
) -> Record:
    """Return a curve's record.

    Args:
        series: what decides its colour.
        label: in the legend.
        x, y: its points; intervals become a band.
        tag: of its numbers.
        style: `dash`, `marker`, `points` (no line), `timed`.
    """
    record = {"series": series, "label": label, "tag": tag, "x": [float(v) for v in x], **style}
    if isinstance(y[0], Interval):
        columns = zip(*y, strict=True)
        return record | {name: list(c) for name, c in zip(("y", "low", "high"), columns, strict=True)}
    return record | {"y": [float(v) for v in y]}  # type: ignore[arg-type]


def axis(label: str, unit: str = "", scale: Literal["linear", "log"] = "linear") -> Record:
    """Return an axis' record."""
    return {"label": label, "unit": unit, "scale": scale}


TIMES = ("seconds", "processor_seconds", "finished")


def without_times(results: Any) -> Any:
    """Return results without what a clock said: two runs of the same settings then are equal."""
    if isinstance(results, dict):
        if results.get("timed"):
            return {"timed": True}
        return {k: without_times(v) for k, v in results.items() if k not in TIMES}
    if isinstance(results, list):
        return [without_times(v) for v in results]
    return results
