"""Comparisons with the field's peers: pinned to one core, alternating, each side in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from megjax.errors import MegError, one_line_errors
from megjax.files import writable, write_file


class Timing(NamedTuple):
    """Seconds of one call: by the clock, and of the processor, which other load disturbs less."""

    wall_s: float
    cpu_s: float


def median_timing(call: Callable[[], Any], calls: int) -> Timing:
    """Median over `calls` calls, after one that is not counted; raises `MegError` for none."""
    if calls < 1:
        raise MegError(f"calls {calls}: at least 1 is allowed")
    call()
    timings = [timed(call)[1] for _ in range(calls)]
    return Timing(*(statistics.median(column) for column in zip(*timings, strict=True)))


def timed(call: Callable[[], Any]) -> tuple[Any, Timing]:
    """The call's result and its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Timing(time.perf_counter() - wall, time.process_time() - cpu)


def alternate(module: str, sides: tuple[str, str], rounds: int, *, core: int, args: list[str]) -> list[dict]:
    """Run `python -m module --side SIDE` for each side in turn, `rounds` times, on one core, one at a time.

    Each run is a fresh process that prints its result as one line of JSON, the last line that it prints.

    Raises:
        MegError: fewer than one round, or see `child`.
    """
    if rounds < 1:
        raise MegError(f"rounds {rounds}: from 1 up")
    results = []
    with tempfile.TemporaryDirectory() as cache:
        env = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        }
        for side in sides * rounds:
            text = child(module, "--side", side, *args, env=env, core=core)
            results.append({"side": side} | json.loads(text.splitlines()[-1]))
            print(results[-1], flush=True)
    return results


def child(
    module: str, *args: str, env: Mapping[str, str], core: int | None = None, show: bool = False
) -> str:
    """Run `python -m module` in a process of its own and return what it prints.

    Args:
        module: to run.
        args: of its command line.
        env: variables besides this process's.
        core: the only one that it may use.
        show: let it print here instead, and return nothing.

    Raises:
        MegError: there is no such core, or the process fails, which says why itself.
    """
    if core is not None and core not in os.sched_getaffinity(0):
        allowed = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise MegError(f"core {core}: this process may use {allowed}")
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        env=os.environ | env,
        stdout=None if show else subprocess.PIPE,
        text=True,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )
    if done.returncode:
        raise MegError(f"python -m {module} ended with exit code {done.returncode}")
    return done.stdout or ""


def ratios(results: list[dict], field: str) -> list[float]:
    """First side over second, pair by pair, in the order in which they ran."""
    return [a[field] / b[field] for a, b in zip(results[::2], results[1::2], strict=True)]


def start(main: Callable[[Any], None], config: type, module: str, *peers: str) -> None:
    """Run a comparison's main on the command line's settings, if its peers are there and `json` is writable.

    Args:
        main: the comparison.
        config: its settings.
        module: its name, as in `python -m`.
        peers: packages that it compares with.
    """
    with one_line_errors():
        settings = tyro.cli(config, prog=f"python -m {module}")
        if missing := [name for name in peers if importlib.util.find_spec(name) is None]:
            raise MegError(f"{', '.join(missing)} not installed: pip install 'megjax[parity]'")
        if settings.json is not None:
            writable(settings.json, "json")
        main(settings)


def save(path: Path | None, report: Any) -> None:
    """Write the report as JSON, if a path is given."""
    if path is not None:
        write_file(path, json.dumps(report, indent=2) + "\n")
