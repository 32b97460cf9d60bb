"""Latency of this machine against FLOPs, with joules where a meter exists: the line of Fig. 3."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

EnergyMeter = Callable[[], float]
"""-> joules since some fixed moment."""

_RAPL = Path("/sys/class/powercap")


class Line(NamedTuple):
    """latency = intercept_s + flops / flops_per_s."""

    flops_per_s: float
    intercept_s: float
    r_squared: float


class Measurement(NamedTuple):
    """One program on this machine."""

    flops: float
    seconds: float
    """Median over the calls."""
    joules: float | None
    """A call's, or None without a meter."""


def energy_meter() -> tuple[str, EnergyMeter] | None:
    """Return a meter and its name: NVML on an NVIDIA GPU, RAPL for a CPU, None where neither can be read."""
    if jax.default_backend() == "gpu":
        return _nvml()
    return _rapl()


def measure(
    call: Callable[[], Any], flops: float, calls: int = 5, meter: EnergyMeter | None = None
) -> Measurement:
    """Time a compiled program; the first call is not counted.

    Args:
        call: runs it and returns its arrays.
        flops: what it computes.
        calls: timed calls, of which the median counts.
        meter: read around all of them.
    """
    jax.block_until_ready(call())
    before = meter() if meter else 0.0
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    joules = (meter() - before) / calls if meter else None
    return Measurement(flops, float(np.median(seconds)), joules)


def fit_line(points: list[Measurement]) -> Line:
    """Fit latency against FLOPs by least squares; R^2 is the share of the variance that the line explains."""
    flops, seconds = np.asarray([p.flops for p in points]), np.asarray([p.seconds for p in points])
    slope, intercept = np.polyfit(flops, seconds, 1)
    residual = seconds - (intercept + slope * flops)
    r_squared = 1.0 - float(np.sum(residual**2) / np.sum((seconds - seconds.mean()) ** 2))
    return Line(1.0 / float(slope), float(intercept), r_squared)


def _nvml() -> tuple[str, EnergyMeter] | None:
    try:
        import pynvml  # an extra: only GPU energies need it

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no driver or a GPU without the counter: NVML has an error class for each
        return None
    return "NVML", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _rapl() -> tuple[str, EnergyMeter] | None:
    packages = sorted(_RAPL.glob("*-rapl:[0-9]*"))
    counters = [p / "energy_uj" for p in packages if p.name.count(":") == 1]
    try:
        first = [int(counter.read_text()) for counter in counters]
        ranges = [int((counter.parent / "max_energy_range_uj").read_text()) for counter in counters]
    except (OSError, ValueError):
        return None
    if not counters:
        return None
    last, total = list(first), [0]

    def joules() -> float:
        # The counters wrap; read at least once a minute, the difference modulo their range is right.
        for i, counter in enumerate(counters):
            now = int(counter.read_text())
            total[0] += (now - last[i]) % (ranges[i] + 1)
            last[i] = now
        return total[0] / 1e6

    return "RAPL", joules
