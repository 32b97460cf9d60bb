"""The stage that times this machine: latency against FLOPs (Fig. 3), and the parts of one frame."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.metering import Measurement, energy_meter, fit_line, measure
from eval.suite.config import MAX_STEPS, MIN_STEPS, SuiteConfig
from eval.suite.context import Context, Stage
from megjax import flops
from megjax.diffusion import Conditioning
from megjax.errors import MegError
from megjax.link.cost import calls_per_step
from megjax.pipeline.load import Pipeline
from megjax.pipeline.split import condition, decode, denoise, unet_params

STEPS = tuple(range(MIN_STEPS, MAX_STEPS + 1, 2))
PICTURES = (1, 4, 16)
"""Decoded at once."""
CALLS = 5

PLAIN, TOME, DECODER = "U-Net", "U-Net, ToMe", "VAE decoder"


def timings(config: SuiteConfig) -> Stage:
    """Return the stage of this machine's latency: `points`, the lines through them, a frame's `parts`."""
    settings = {
        "steps": list(STEPS),
        "pictures": list(PICTURES),
        "calls": CALLS,
        "guidance": config.guidance,
        "tome": config.tome,
        "dtype": config.dtype,
        # Another machine's are not this one's, though its folder may come here.
        "machine": [platform.processor(), os.cpu_count()],
    }
    return Stage("timing this machine", settings, _timings)


def _timings(context: Context, settings: Mapping[str, Any]) -> dict[str, Any]:
    pipeline, meter = context.pipeline, energy_meter()
    prompts = calls_per_step(settings["guidance"])
    points, measured = [], {}
    for kind, amount, call, counted in _programs(pipeline, settings):
        try:
            found = measure(call, counted, settings["calls"], meter and meter[1])
        except MegError:  # a counter that stands still tells no more than none
            meter, found = None, measure(call, counted, settings["calls"])
        points.append({"kind": kind, "amount": amount, **found._asdict()})
        measured.setdefault(kind, []).append(found)
    lines = {kind: fit_line(own)._asdict() for kind, own in measured.items()}
    lines["all"] = fit_line([point for own in measured.values() for point in own])._asdict()
    parts = {
        "text_s": measure(lambda: _text(pipeline, prompts), 0.0, settings["calls"]).seconds,
        "step_s": _per_step(measured[PLAIN], settings["steps"]),
        "tome_step_s": _per_step(measured[TOME], settings["steps"]),
        "decode_s": measured[DECODER][0].seconds,
    }
    return {"points": points, "lines": lines, "parts": parts, "meter": meter[0] if meter else None}


def _per_step(points: list[Measurement], steps: list[int]) -> float:
    return float(np.polyfit(steps, [point.seconds for point in points], 1)[0])


def _programs(pipeline: Pipeline, settings: Mapping[str, Any]) -> Iterator[tuple[str, int, Any, float]]:
    """Yield (kind, steps or pictures, call, FLOPs): one picture's T steps, and the decoder."""
    params, sampler = unet_params(pipeline)
    side = pipeline.unet.config.sample_size
    noise = jax.random.normal(jax.random.key(0), (1, side, side, pipeline.unet.config.in_channels))
    text, guidance = _text(pipeline, 1), settings["guidance"]
    empty = text if calls_per_step(guidance) == 2 else None
    for kind, ratio in ((PLAIN, 0.0), (TOME, settings["tome"])):
        options = {"sampler": sampler, "tome_ratio": ratio}
        inputs = (pipeline, params, noise, text, empty)
        args = [(*inputs, steps, guidance, noise, 1.0) for steps in settings["steps"]]
        # One loop runs T times, so two counts tell all.
        ends = settings["steps"][0], settings["steps"][-1]
        counts = [flops.count(denoise, *args[0], dynamic_trips=steps, **options).flops for steps in ends]
        for steps, own in zip(settings["steps"], args, strict=True):
            counted = float(np.interp(steps, ends, counts))
            yield kind, steps, lambda a=own, o=options: denoise(*a, **o), counted
    decoder = pipeline.params["vae_decoder"]
    for pictures in settings["pictures"]:
        z = jnp.repeat(noise, pictures, axis=0)
        counted = flops.count(decode, pipeline, decoder, z).flops
        yield DECODER, pictures, lambda z=z: decode(pipeline, decoder, z), counted


def _text(pipeline: Pipeline, prompts: int) -> Conditioning:
    """Run both text encoders on so many prompts."""
    ids = jnp.zeros((2, prompts, pipeline.text_encoders[0].config.max_position_embeddings), jnp.int32)
    return condition(pipeline, pipeline.params, ids, size=(pipeline.image_size, pipeline.image_size))
