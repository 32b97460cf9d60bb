"""`python -m eval.backbone`: how good a backbone trained on `scenes` is, by its pictures alone.

    python -m eval.backbone --model tiny --captions 500

prints (and with `--output` writes as JSON) the share of fresh captions drawn entirely right, also of
captions with a held-out attribute pair, each attribute's own share, and the PSNR of the autoencoder on fresh
scenes and on the photographs that it has not seen.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import track

from eval.captions import Score, check
from eval.prompts import draw, prompts_of
from megjax.checks import LARGEST_SEED, within
from megjax.data.grammar import captions
from megjax.data.photos import HELD_OUT, load_photos, random_crops
from megjax.data.render import render
from megjax.data.scenes import Split, sample_scenes
from megjax.errors import MegError, one_line_errors
from megjax.files import writable, write_file
from megjax.pipeline import Pipeline, Request, load_pipeline
from megjax.pipeline import check as check_request
from megjax.pipeline.split import decode


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = "tiny"
    """An embedded backbone, or a folder in diffusers layout."""
    captions: int = 500
    """Fresh captions of each split."""
    batch: int = 50
    steps: int = 50
    """DDIM steps."""
    guidance: float = 2.5
    seed: int = 2024
    output: Path | None = None
    """Also write the figures here, as JSON."""


def caption_accuracy(pipeline: Pipeline, config: Config, split: Split) -> dict[str, Any]:
    """Share of captions whose pictures are right in every attribute named, and of each attribute."""
    key = jax.random.fold_in(jax.random.key(config.seed), split == "held_out")
    right: list[bool] = []
    by_attribute: dict[str, list[int]] = {}
    for i in track(range(0, config.captions, config.batch), f"captions, {split}"):
        key_scene, key_noise = jax.random.split(jax.random.fold_in(key, i))
        texts = captions(sample_scenes(key_scene, config.batch, split))
        prompts = prompts_of(pipeline, texts, key_noise)
        z = draw(pipeline, prompts, "ddim", config.steps, config.guidance)
        score: Score = check(np.asarray(decode(pipeline, pipeline.params["vae_decoder"], z)), texts)
        right += [bool(r) for r in score.right_B]
        for name, (good, total) in score.detail.items():
            counts = by_attribute.setdefault(name, [0, 0])
            counts[0] += good
            counts[1] += total
    return {
        "right": float(np.mean(right)),
        "captions": len(right),
        **{name: good / total for name, (good, total) in by_attribute.items() if total},
    }


def autoencoder_psnr_db(pipeline: Pipeline, images: jax.Array) -> float:
    """PSNR in dB of the mean squared error over all pictures."""
    encode = jax.jit(lambda params, x: pipeline.vae_encoder(params, x)[0])
    params = pipeline.params
    out = decode(pipeline, params["vae_decoder"], encode(params["vae_encoder"], images))
    return float(-10 * jnp.log10(jnp.mean(jnp.square(out - images))))


@one_line_errors()
def main(config: Config) -> None:
    """Measure and print."""
    if config.batch < 1 or config.captions < 1 or config.captions % config.batch:
        raise MegError(
            f"captions {config.captions}, batch {config.batch}: at least 1 caption, a multiple of the batch"
        )
    within(config, 1, math.inf, "steps")
    within(config, 0, LARGEST_SEED, "seed")
    if config.output is not None:
        writable(config.output)
    pipeline = load_pipeline(config.model)
    check_request(
        Request("", steps=config.steps, guidance=config.guidance, seed=config.seed, sampler="ddim"), pipeline
    )
    size = pipeline.image_size
    scenes = render(sample_scenes(jax.random.key(config.seed), 500, "all"), size)
    crops = random_crops(load_photos(HELD_OUT), np.random.default_rng(config.seed), 100, size)
    result = {
        "model": config.model,
        "steps": config.steps,
        "guidance": config.guidance,
        "seed": config.seed,
        "vae_psnr_db": {
            "scenes": autoencoder_psnr_db(pipeline, scenes),
            "held_out_photographs": autoencoder_psnr_db(pipeline, jnp.asarray(crops)),
        },
        "captions": {split: caption_accuracy(pipeline, config, split) for split in ("train", "held_out")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if config.output is not None:
        write_file(config.output, text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m eval.backbone"))
