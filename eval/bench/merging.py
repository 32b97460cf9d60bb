"""Match, merge and unmerge on one CPU core in float32, against tomesd.

    python -m eval.bench.merging [--rounds 5] [--traced] [--json OUT.json]

Both sides draw a new partition in every call and run in alternating processes pinned to one core. Prints, for
each shape, the median milliseconds of a call and the median of the paired ratios, MegJAX over tomesd: by the
clock, and in processor seconds, which other load disturbs less. Also the extra memory of one call at 16384
tokens of 640 values, output included: as compiled, and as the process's peak grows. Takes minutes; needs the
extra `parity`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eval.bench import alternate, median_timing, ratios, save, start

SHAPES = ((2, 64, 640, 15), (2, 32, 1280, 30), (1, 64, 16, 200))
"""Batch, grid side, values of a token, timed calls."""
MEMORY_SHAPE = (1, 128, 640)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Args:
        ratio: merging ratio.
        traced: whether MegJAX's ratio is traced: fixed shapes, one executable for every ratio.
        rounds: pairs of processes.
        core: the CPU core.
        json: where to write the figures, if anywhere.
        side: run one side in this process and print its figures as JSON.
    """

    ratio: float = 0.5
    traced: bool = False
    rounds: int = 5
    core: int = 0
    json: Path | None = None
    side: Literal["megjax", "tomesd"] | None = None


def main(config: Config) -> None:
    """Time both sides, or the one that is asked for."""
    if config.side is not None:
        make_call = {"megjax": megjax_call, "tomesd": tomesd_call}[config.side]
        # Memory first, while the allocator holds no pages of earlier calls.
        figures = memory(config) if config.side == "megjax" else {}
        for batch, side, channels, calls in SHAPES:
            timing = median_timing(make_call(config, batch, side, channels), calls)
            figures |= {f"{name(batch, side, channels)} {k}": v for k, v in timing._asdict().items()}
        print(json.dumps(figures))
        return
    args = [f"--ratio={config.ratio}", "--traced" if config.traced else "--no-traced"]
    results = alternate(
        "eval.bench.merging", ("megjax", "tomesd"), config.rounds, core=config.core, args=args
    )
    report: dict[str, Any] = {"ratio": config.ratio, "traced": config.traced, "runs": results}
    for batch, side, channels, _ in SHAPES:
        shape = name(batch, side, channels)
        for clock in ("wall_s", "cpu_s"):
            field = f"{shape} {clock}"
            ours, theirs = (
                statistics.median(run[field] for run in results[start::2]) * 1e3 for start in (0, 1)
            )
            report[field] = statistics.median(ratios(results, field))
            print(f"{field}: MegJAX {ours:.2f} ms, tomesd {theirs:.2f} ms, ratio {report[field]:.3f}")
    for field in ("compiled_extra_mb", "peak_extra_mb"):
        report[field] = max(run[field] for run in results[::2])
        print(f"{field} at {name(*MEMORY_SHAPE)}: {report[field]:.0f}")
    save(config.json, report)


def name(batch: int, side: int, channels: int) -> str:
    """The shape's name."""
    return f"B{batch} N{side * side} C{channels}"


def tokens(batch: int, side: int, channels: int) -> np.ndarray:
    """Random tokens."""
    return np.random.default_rng(0).standard_normal((batch, side * side, channels), np.float32)


def megjax_forward(config: Config, side: int) -> Callable[..., Any]:
    """Our match, merge and unmerge, of tokens, a step that seeds the partition, and the ratio."""
    import jax

    from megjax.merging import match, merge, unmerge

    @jax.jit
    def forward(x: jax.Array, step: jax.Array, ratio: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), step)
        plan = match(x, key, ratio if config.traced else config.ratio, (side, side))
        return unmerge(merge(x, plan), plan)

    return forward


def megjax_call(config: Config, batch: int, side: int, channels: int) -> Callable[[], Any]:
    """A call of ours with its inputs."""
    import itertools

    import jax.numpy as jnp

    forward, steps = megjax_forward(config, side), itertools.count()
    x, ratio = jnp.asarray(tokens(batch, side, channels)), jnp.float32(config.ratio)
    return lambda: forward(x, np.int32(next(steps)), ratio).block_until_ready()


def tomesd_call(config: Config, batch: int, side: int, channels: int) -> Callable[[], Any]:
    """The same by tomesd."""
    import torch
    from tomesd.merge import bipartite_soft_matching_random2d

    torch.set_num_threads(1)
    x, generator = torch.from_numpy(tokens(batch, side, channels)), torch.Generator().manual_seed(0)
    merged = int(config.ratio * side * side)

    @torch.inference_mode()
    def call() -> Any:
        merge, unmerge = bipartite_soft_matching_random2d(x, side, side, 2, 2, merged, generator=generator)
        return unmerge(merge(x))

    return call


def memory(config: Config) -> dict[str, float]:
    """Megabytes that one call adds to its input: by the compiler's account, and by the process's peak."""
    import jax.numpy as jnp

    batch, side, channels = MEMORY_SHAPE
    args = (jnp.asarray(tokens(batch, side, channels)), np.int32(0), np.float32(config.ratio))
    compiled = megjax_forward(config, side).lower(*args).compile()
    account = compiled.memory_analysis()
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts anew from what is resident now.
    before = resident_kb("VmRSS")
    compiled(*args).block_until_ready()
    return {
        "compiled_extra_mb": (account.temp_size_in_bytes + account.output_size_in_bytes) / 1e6,
        "peak_extra_mb": (resident_kb("VmHWM") - before) / 1e3,
    }


def resident_kb(field: str) -> int:
    """A field of the kernel's account of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    start(main, Config, "eval.bench.merging", "torch", "tomesd")
