"""`python -m eval.distillation`: what distillation is worth, on fresh captions of `scenes`.

    python -m eval.distillation --model tiny --captions 500 --pictures 2000

Two parts. The diffuser: captions drawn right at each number of steps beside the teacher's 50, and errors
of its pictures against the teacher's from the same noise and its own 12 steps. The decoders, at
one PSNR with paired noise: *compression* (T = 12, where reference and sent latent agree, so that only merging
and noise count) and *system* (T = 7; 8 and 12 for the Split pair), against T = 12 through the frozen decoder.
Means have 95 % intervals over pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float
from rich.progress import track

from eval.captions import check
from eval.prompts import Prompts, draw, prompts_of, refuse_windows
from eval.suite.methods import LABELS, PRUNINGS, Name, bits, level_at, method
from megjax.allocator import keep_freed_memory
from megjax.checks import LARGEST_SEED, within
from megjax.data.grammar import captions
from megjax.data.scenes import sample_scenes
from megjax.errors import MegError, one_line_errors
from megjax.files import writable, write_file
from megjax.models import Params
from megjax.pipeline import Pipeline, load_pipeline
from megjax.pipeline.split import Sampler, decode

STEPS = (4, 6, 8, 10, 12)
SYSTEM_STEPS = 7
"""MEG's and the prunings' in the system view."""
RATIOS = tuple(round(0.05 * i, 2) for i in range(20))
"""0.95 merges as many as 15/16 does, the most that two rounds can."""
SENT_RATIO = 0.4
"""MEG's in the comparison with pruning at equal bits."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = "tiny"
    """A distilled backbone."""
    captions: int = 500
    """For the diffuser; 0 leaves it out."""
    pictures: int = 2000
    """For the decoders; 0 leaves them out."""
    batch: int = 50
    teacher_guidance: float = 3.0
    """Of the teacher, in its pictures and in the windows that the student learned from."""
    guidance: float = 2.5
    """Of the student in the system."""
    psnr_db: float = 10.0
    seed: int = 2025
    output: Path | None = None
    """Also write the figures here, as JSON."""


def fresh_prompts(pipeline: Pipeline, key: Array, batch: int) -> tuple[Prompts, Array]:
    """Draw captions and the noise that every method starts from; return the key of the air, too."""
    key_scene, key_noise, key_air = jax.random.split(key, 3)
    return prompts_of(pipeline, captions(sample_scenes(key_scene, batch)), key_noise), key_air


def interval(values: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Mean and the half width of its 95 % interval over pictures."""
    return {"mean": float(values.mean()), "ci95": float(1.96 * values.std(ddof=1) / len(values) ** 0.5)}


def squared_errors(a_BxHxWx3: Array, b_BxHxWx3: Array) -> np.ndarray:
    """Each picture's mean squared error."""
    return np.asarray(jnp.mean(jnp.square(a_BxHxWx3 - b_BxHxWx3), axis=(1, 2, 3)))


def diffuser(pipeline: Pipeline, config: Config) -> dict[str, Any]:
    """Captions drawn right, and distances between pictures from the same noise."""
    frozen = pipeline.params["vae_decoder"]
    right: dict[str, list[bool]] = {}
    errors: dict[str, list[np.ndarray]] = {}

    def add(name: str, values: np.ndarray) -> None:
        errors.setdefault(name, []).append(values)

    for i in track(range(0, config.captions, config.batch), "diffuser"):
        prompts, _ = fresh_prompts(pipeline, jax.random.fold_in(jax.random.key(config.seed), i), config.batch)

        def picture(sampler: Sampler, steps: int, guidance: float, prompts: Prompts = prompts) -> Array:
            return decode(pipeline, frozen, draw(pipeline, prompts, sampler, steps, guidance))

        teacher = picture("ddim", 50, config.teacher_guidance)
        drawn = {"teacher 50": teacher}
        alone = {steps: picture("perflow", steps, 1.0) for steps in STEPS}
        guided = {steps: picture("perflow", steps, config.guidance) for steps in STEPS}
        for steps in STEPS:
            drawn[f"student {steps}, guidance 1"] = alone[steps]
            drawn[f"student {steps}, guidance {config.guidance:g}"] = guided[steps]
            add(f"student {steps} to teacher", squared_errors(alone[steps], teacher))
            ddim = picture("ddim", steps, config.teacher_guidance)
            add(f"ddim {steps} to teacher", squared_errors(ddim, teacher))
        for steps, after in itertools.pairwise(STEPS):
            add(f"student {steps} to its 12", squared_errors(guided[steps], guided[12]))
            add(
                f"student {steps} less {after}, to its 12",
                squared_errors(guided[steps], guided[12]) - squared_errors(guided[after], guided[12]),
            )
        for name, images in drawn.items():
            right.setdefault(name, []).extend(check(np.asarray(images), prompts.texts).right_B.tolist())
    return {
        "captions_right": {name: float(np.mean(values)) for name, values in right.items()},
        "mse": {name: interval(np.concatenate(values)) for name, values in errors.items()},
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def received_pictures(
    pipeline: Pipeline, name: Name, params: Params, key: Array, z_BxHxWxC: Array, level: Array, psnr_db: Array
) -> Array:
    """What a baseline's device shows; `params` are the pipeline's."""
    way = method(dataclasses.replace(pipeline, params=params), name)
    keys = jax.random.split(key, len(z_BxHxWxC))
    z = jax.vmap(way.send, in_axes=(0, 0, None, None))(keys, z_BxHxWxC, level, psnr_db)
    return decode(pipeline, way.decoder, z)


def decoders(pipeline: Pipeline, config: Config) -> dict[str, Any]:
    """Errors of every decoder at one PSNR, in both views."""
    frozen, psnr_db = pipeline.params["vae_decoder"], jnp.float32(config.psnr_db)
    z_shape = (pipeline.unet.config.sample_size,) * 2 + (pipeline.unet.config.in_channels,)
    sent = bits("meg", z_shape, SENT_RATIO)
    levels: dict[Name, tuple[float, ...]] = {"split": (0.0,), "split_finetune": (0.0,), "meg": RATIOS}
    for name in PRUNINGS if "gate" in pipeline.params else PRUNINGS[1:]:
        if (level := level_at(name, z_shape, sent)) is not None:
            levels[name] = (level,)
    views: dict[str, dict[Name, tuple[int, ...]]] = {
        "compression": dict.fromkeys(levels, (12,)),
        "system": {name: (8, 12) if name.startswith("split") else (SYSTEM_STEPS,) for name in levels},
    }
    errors: dict[str, list[np.ndarray]] = {}
    for i in track(range(0, config.pictures, config.batch), "decoders"):
        key = jax.random.fold_in(jax.random.key(config.seed + 1), i)
        prompts, key_air = fresh_prompts(pipeline, key, config.batch)
        latents = {T: draw(pipeline, prompts, "perflow", T, config.guidance) for T in (SYSTEM_STEPS, 8, 12)}
        reference = decode(pipeline, frozen, latents[12])
        floor = squared_errors(decode(pipeline, frozen, latents[SYSTEM_STEPS]), reference)
        errors.setdefault(f"system/diffuser alone/T {SYSTEM_STEPS}", []).append(floor)
        for view, methods in views.items():
            for name, steps in methods.items():
                for T, level in itertools.product(steps, levels[name]):
                    image = received_pictures(
                        pipeline, name, pipeline.params, key_air, latents[T], jnp.float32(level), psnr_db
                    )
                    place = f"{view}/{name}/T {T}/{level:.4g}"
                    errors.setdefault(place, []).append(squared_errors(image, reference))
    flat = {name: np.concatenate(values) for name, values in errors.items()}
    steps = [
        flat[f"compression/meg/T 12/{after:.4g}"] - flat[f"compression/meg/T 12/{before:.4g}"]
        for before, after in itertools.pairwise(RATIOS)
    ]
    return {
        "bits": {"latent": bits("split", z_shape, 0.0), "sent": sent},
        "labels": LABELS,
        "mse": {name: interval(values) for name, values in flat.items()},
        "meg_rise_per_step": [interval(step) for step in steps],
    }


def refuse(config: Config) -> None:
    """Refuse what cannot be measured, before anything is.

    Raises:
        MegError: captions or pictures that are not whole batches or a single one; a seed, guidance or PSNR
            out of range; a file that cannot be written.
    """
    counts = (config.captions, config.pictures)
    whole = config.batch >= 1 and not any(count % config.batch for count in counts)
    if not whole or min(counts) < 0 or 1 in counts:
        raise MegError(
            f"captions {config.captions}, pictures {config.pictures}, batch {config.batch}: multiples of a "
            "batch of at least 1, 2 or more for an interval, or 0 to leave a part out"
        )
    within(config, 0, LARGEST_SEED, "seed")
    within(config, 0, 1e3, "guidance", "teacher_guidance")
    within(config, -100, 1e3, "psnr_db")
    if config.output is not None:
        writable(config.output)


def refuse_model(pipeline: Pipeline, config: Config) -> None:
    """Refuse a backbone that lacks what is to be measured: other weights would stand in for it.

    Raises:
        MegError: no student, one of too many windows, or decoders that are missing.
    """
    if not (config.captions or config.pictures):
        return
    params = pipeline.params
    if "student" not in params:
        raise MegError(
            f"{pipeline.name}: has no student; distil one first (python -m train.distill_diffuser)"
        )
    refuse_windows(pipeline, min(STEPS) if config.captions else SYSTEM_STEPS)
    decoders = params.get("decoders", {})
    needed = ["meg", "split_finetune"]
    # Magnitudes are pruned for either pruning's decoder.
    needed += ["pruning"] if "gate" in params or "magnitude_pruning" not in decoders else []
    missing = [name for name in needed if name not in decoders]
    if config.pictures and missing:
        raise MegError(
            f"{pipeline.name}: has no decoder {', '.join(missing)}; distil it first "
            "(python -m train.distill_decoder), or leave the decoders out with --pictures 0"
        )


@one_line_errors()
def main(config: Config) -> None:
    """Measure and print."""
    refuse(config)
    keep_freed_memory()
    pipeline = load_pipeline(config.model)
    refuse_model(pipeline, config)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    result: dict[str, Any] = {"settings": settings}
    if config.captions:
        result["diffuser"] = diffuser(pipeline, config)
    if config.pictures:
        result["decoders"] = decoders(pipeline, config)
    text = json.dumps(result, indent=2)
    print(text)
    if config.output is not None:
        write_file(config.output, text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m eval.distillation"))
