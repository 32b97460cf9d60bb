"""Latency of this machine against FLOPs, with joules where a meter exists: the line of Fig. 3."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from megjax.errors import MegError

EnergyMeter = Callable[[], float]
"""-> joules since some fixed moment."""

_RAPL = Path("/sys/class/powercap")
_METERED_S = 2.0
"""Least time between two readings: some counters move ten times a second."""


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
    meters = {"gpu": _nvml, "cpu": _rapl}
    backend = jax.default_backend()
    return meters[backend]() if backend in meters else None


def measure(
    call: Callable[[], Any], flops: float, calls: int = 5, meter: EnergyMeter | None = None
) -> Measurement:
    """Time a compiled program; the first call is not counted.

    Args:
        call: runs it and returns its arrays.
        flops: what it computes.
        calls: timed calls, of which the median counts; with a meter more, until two seconds have passed.
        meter: read around all of them.

    Raises:
        MegError: the meter did not move.
    """
    jax.block_until_ready(call())
    before = meter() if meter else 0.0
    seconds, begun = [], time.perf_counter()
    while len(seconds) < calls or (meter and time.perf_counter() - begun < _METERED_S):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    joules = (meter() - before) / len(seconds) if meter else None
    if joules is not None and not joules > 0:
        raise MegError(
            f"energy {joules:g} J a call: the machine's counter stands still; "
            "give the power under load instead (--power-w)"
        )
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
        # NVML counts every GPU of the machine, JAX those that CUDA is shown: its first is the first of them.
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if first.startswith(("GPU-", "MIG-")):
            handle = pynvml.nvmlDeviceGetHandleByUUID(first)
        else:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(first))
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no driver or a GPU without the counter: NVML has an error class for each
        return None
    return "NVML", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _rapl() -> tuple[str, EnergyMeter] | None:
    zones = [p for p in sorted(_RAPL.glob("*-rapl:[0-9]*")) if p.name.count(":") == 1]
    try:
        # Beside the packages there may be one of the whole platform, which holds them too.
        packages = [zone for zone in zones if (zone / "name").read_text().strip() != "psys"]
        counters = [package / "energy_uj" for package in packages]
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
