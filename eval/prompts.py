"""Prompts ready to be drawn, with the noise that each starts from, and their latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megjax.diffusion import Conditioning
from megjax.errors import MegError
from megjax.link.cost import calls_per_step
from megjax.pipeline import Pipeline
from megjax.pipeline.split import Sampler, condition, denoise, unet_params
from megjax.text import tokenize


class Prompts(NamedTuple):
    """A batch of prompts."""

    texts: Sequence[str]
    prompt: Conditioning
    empty: Conditioning
    noise_BxHxWxC: Float[Array, "B H W C"]


def refuse_windows(pipeline: Pipeline, fewest: int) -> None:
    """Refuse a student that would take the fewest steps to be measured as more, one a window.

    Args:
        pipeline: whose student, if it has one, draws.
        fewest: steps to be measured.

    Raises:
        MegError: its windows are more.
    """
    windows = pipeline.flow.windows
    if "student" in pipeline.params and windows > fewest:
        raise MegError(
            f"{pipeline.name}: its student has {windows} windows and draws in no fewer steps, and pictures "
            f"of {fewest} steps are measured here; take a student of {fewest} windows at most"
        )


def prompts_of(pipeline: Pipeline, texts: Sequence[str], key: Key[Array, ""]) -> Prompts:
    """Return prompts' and as many empty prompts' conditioning, and noise.

    Args:
        pipeline: whose text encoders run.
        texts: the prompts.
        key: of the noise.
    """
    size, config = (pipeline.image_size,) * 2, pipeline.unet.config
    both = (tokenize(pipeline.tokenizers, t, allow_empty=True) for t in (texts, [""] * len(texts)))
    prompt, empty = (condition(pipeline, pipeline.params, jnp.asarray(ids), size=size) for ids in both)
    shape = (len(texts), config.sample_size, config.sample_size, config.in_channels)
    return Prompts(texts, prompt, empty, jax.random.normal(key, shape, jnp.float32))


def draw(
    pipeline: Pipeline,
    prompts: Prompts,
    sampler: Sampler,
    steps: int,
    guidance: float,
    tome_ratio: float = 0.0,
) -> Float[Array, "B H W C"]:
    """Return the latents after so many steps; guidance 1 is one call of the U-Net a step.

    Args:
        pipeline: whose U-Net, or student by `perflow`, runs.
        prompts: to draw.
        sampler: `ddim` or `perflow`.
        steps: T.
        guidance: of classifier-free guidance.
        tome_ratio: of the tokens merged inside the U-Net's self-attention.
    """
    params, noise = unet_params(pipeline, sampler)[0], prompts.noise_BxHxWxC
    empty = prompts.empty if calls_per_step(guidance) == 2 else None
    return denoise(
        pipeline,
        params,
        noise,
        prompts.prompt,
        empty,
        steps,
        guidance,
        jnp.zeros_like(noise),
        1.0,
        sampler=sampler,
        tome_ratio=tome_ratio,
    )
