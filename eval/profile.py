"""Measure this machine: latency against FLOPs, the line of Fig. 3, saved as a hardware profile.

    python -m eval.profile [--out PROFILE.json] [--power-w WATTS] [--device phone_flagship]

Runs MEG-Tiny's U-Net and VAE decoder with random weights over a range of batch sizes, counts their FLOPs from
the compiled programs, and fits latency = t0 + FLOPs / f. Energy comes from NVML (NVIDIA GPUs) or RAPL (CPUs)
where it can be read; otherwise give the machine's power under load.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from configs.pretrain import TINY
from eval.metering import Measurement, energy_meter, fit_line, measure
from megjax import flops
from megjax.errors import MegError, one_line_errors
from megjax.files import writable, write_file
from megjax.link import profiles
from megjax.models import unet, vae_decoder


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure and where to write it."""

    out: Path = Path("profile.json")
    """The profile; the measured points go beside it, as .points.json."""
    power_w: float | None = None
    """Power under load, where no meter can be read."""
    device: str = "phone_flagship"
    """The machine at the other end."""
    calls: int = 5
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    name: str = "measured"


@one_line_errors()
def main(config: Config) -> None:
    """Measure, fit, save."""
    if config.calls < 1 or not config.batches or min(config.batches) < 1:
        raise MegError(f"calls {config.calls}, batches {config.batches}: at least 1 call, batches from 1 up")
    if config.power_w is not None and not 0 < config.power_w < math.inf:
        raise MegError(f"power_w {config.power_w}: finite numbers of watts above 0 are allowed")
    points_path = writable(writable(config.out, "out").with_suffix(".points.json"), "out")
    other = profiles.load("a40", config.device)
    assert isinstance(other, profiles.Profile)
    meter = energy_meter() if config.power_w is None else None
    if meter is None and config.power_w is None:
        raise MegError(
            "no NVML or RAPL energy counter can be read here: give --power-w, the power under load"
        )
    points = []
    for label, program, args in programs(config.batches):
        point = measure(
            lambda f=program, a=args: f(*a),
            flops.count(program, *args).flops,
            config.calls,
            meter and meter[1],
        )
        print(f"{label:24s} {point.flops / 1e9:10.3f} GFLOP {point.seconds * 1e3:10.2f} ms", flush=True)
        points.append(point)
    line = fit_line(points)
    j_per_flop, energy_source = energy(points, config.power_w, line.flops_per_s, meter and meter[0])
    source = f"measured on {jax.devices()[0].device_kind}, R^2 {line.r_squared:.4f}; energy: {energy_source}"
    access_s = max(line.intercept_s, 0.0)
    machine = profiles.Machine(line.flops_per_s, j_per_flop, access_s, source)
    profiles.save(config.out, profiles.Profile(config.name, machine, other.device))
    write_file(points_path, json.dumps([point._asdict() for point in points], indent=2))
    print(
        f"{line.flops_per_s / 1e12:.4f} TFLOP/s, t0 {line.intercept_s * 1e3:.2f} ms, R^2 {line.r_squared:.4f}"
    )
    print(f"{j_per_flop * 1e12:.2f} J/TFLOP ({energy_source}); written to {config.out}")


def programs(batches: tuple[int, ...]) -> Iterator[tuple[str, Any, tuple]]:
    """Yield (label, jitted program, arguments) of growing cost."""
    denoiser, decoder = unet(TINY.unet), vae_decoder(TINY.vae)
    weights, decoder_weights = denoiser.init(jax.random.key(0)), decoder.init(jax.random.key(1))
    call, decode = jax.jit(denoiser.__call__), jax.jit(decoder.__call__)
    side, config = TINY.unet.sample_size, TINY.unet
    for batch in batches:
        latents = jnp.zeros((batch, side, side, config.in_channels))
        text = jnp.zeros((batch, 32, config.cross_attention_dim))
        pooled = jnp.zeros((batch, config.pooled_dim))
        args = (weights, latents, jnp.zeros(batch), text, pooled, jnp.zeros((batch, 6)))
        yield f"U-Net call, batch {batch}", call, args
        yield f"VAE decoder, batch {batch}", decode, (decoder_weights, latents)


def energy(
    points: list[Measurement], power_w: float | None, flops_per_s: float, meter: str | None
) -> tuple[float, str]:
    """Return joules per FLOP and where they come from; a given power overrides a meter."""
    if power_w is not None:
        return power_w / flops_per_s, f"{power_w:g} W as given"
    joules = sum(point.joules or 0.0 for point in points)
    return joules / sum(point.flops for point in points), str(meter)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m eval.profile"))
