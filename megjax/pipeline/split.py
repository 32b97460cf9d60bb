"""The split, Eq. (8): y = decode(unmerge(channel(merge(denoise(x, T), r)))), as compiled functions."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from megjax import merging
from megjax.diffusion import (
    Conditioning,
    conditioned,
    ddim,
    ddim_timesteps,
    encode_text,
    guided,
    noised,
    perflow,
    perflow_timesteps,
)
from megjax.errors import MegError
from megjax.link.features import FeatureRules, transmit
from megjax.models import Params, VAEConfig, latent_unit
from megjax.pipeline.load import Pipeline

Sampler = Literal["ddim", "perflow"]
"""How the U-Net's predictions become a latent: a teacher's by DDIM, a student's by Eq. (11)."""


Unit: TypeAlias = tuple[float, ...] | None
"""What the features' noise is relative to: the message's own power (None), or so much of each channel."""


class Received(NamedTuple):
    """What the device makes of a message.

    Args:
        z_BxHxWxC: un-merged noisy latents.
        tokens_B: tokens sent a picture, N - R.
    """

    z_BxHxWxC: Float[Array, "B H W C"]
    tokens_B: Int[Array, " B"]


class RequestKeys(NamedTuple):
    """What a seed stands for; server and device derive it alike.

    Args:
        noise: of the latent that denoising starts from.
        link: of `send`, which splits it into the next two.
        partition: of the tokens.
        channel: of the channel's noise.
    """

    noise: Key[Array, ""]
    link: Key[Array, ""]
    partition: Key[Array, ""]
    channel: Key[Array, ""]


def request_keys(seed: UInt32[Array, ""] | int) -> RequestKeys:
    """Split a request's seed into its keys, of the generator that messages name partitions by."""
    noise, link = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    return RequestKeys(noise, link, *_link_keys(link))


def _link_keys(key: Key[Array, ""]) -> Key[Array, " 2"]:
    """Of partition and channel noise."""
    return jax.random.split(key)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("size",))
def condition(
    pipeline: Pipeline, params: dict[str, Params], ids_2xBxL: Int[Array, "2 B L"], *, size: tuple[int, int]
) -> Conditioning:
    """Run both text encoders.

    Args:
        pipeline: the networks.
        params: `pipeline.params`.
        ids_2xBxL: token ids for each encoder.
        size: height and width of the pictures; pixels.
    """
    text_params = (params["text_encoder"], params["text_encoder_2"])
    return encode_text(pipeline.text_encoders, text_params, (ids_2xBxL[0], ids_2xBxL[1]), size)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("sampler", "tome_ratio"))
def denoise(
    pipeline: Pipeline,
    params: Params,
    noise_BxHxWxC: Float[Array, "B H W C"],
    prompt: Conditioning,
    empty: Conditioning | None,
    steps: Int[Array, ""] | int,
    guidance: Float[Array, ""] | float,
    start_BxHxWxC: Float[Array, "B H W C"],
    strength: Float[Array, ""] | float,
    *,
    sampler: Sampler = "ddim",
    tome_ratio: float = 0.0,
) -> Float[Array, "B H W C"]:
    """Run the U-Net's T steps on the edge server; one executable for every T, guidance and strength.

    Args:
        pipeline: the networks and the schedule.
        params: of the U-Net.
        noise_BxHxWxC: unit Gaussian noise.
        prompt: conditioning of the prompts.
        empty: conditioning of the empty or negative prompts; None is guidance 1, one U-Net call a step.
        steps: T, traced; `perflow` takes fewer than its windows as so many.
        guidance: of classifier-free guidance, traced; not read where `empty` is None.
        start_BxHxWxC: latents of a picture to start from (SDEdit); any at strength 1.
        strength: share of the steps that is run, traced; 1 starts from pure noise.
        sampler: `ddim` for a teacher's parameters, `perflow` for a student's.
        tome_ratio: of the tokens merged inside every self-attention (ToMe); static.
    """
    schedule = pipeline.schedule
    steps = jnp.asarray(steps, jnp.int32)
    kind, windows = pipeline.flow
    if sampler == "perflow":
        steps = jnp.maximum(steps, windows)
    first = steps - steps_run(steps, strength)
    if sampler == "perflow":
        t = perflow_timesteps(schedule, steps, first, windows)[0] - 1
    else:
        t, _ = ddim_timesteps(schedule, steps, first)
    partly = noised(schedule, start_BxHxWxC, noise_BxHxWxC, jnp.full(len(noise_BxHxWxC), t))
    z = jnp.where(jnp.asarray(strength) >= 1.0, noise_BxHxWxC, partly)
    _, height, width, _ = noise_BxHxWxC.shape
    token_merge = merging.tome(tome_ratio, (height, width)) if tome_ratio else None
    if empty is None:
        predict = conditioned(pipeline.unet, params, prompt, token_merge)
    else:
        predict = guided(pipeline.unet, params, prompt, empty, guidance, token_merge)
    if sampler == "perflow":
        return perflow(predict, z, schedule, steps, first, kind=kind, windows=windows)
    return ddim(predict, z, schedule, steps, first)


def steps_run(steps: Int[Array, ""] | int, strength: Float[Array, ""] | float) -> Int[Array, ""]:
    """How many of T steps run from a picture (SDEdit), the least noisy ones: floor(T s), at least one."""
    # The small term keeps 10 x 0.3 from being 2.9999.
    return jnp.clip(jnp.floor(steps * jnp.asarray(strength) + 1e-4).astype(jnp.int32), 1, steps)


def unet_params(pipeline: Pipeline, sampler: Sampler | None = None) -> tuple[Params, Sampler]:
    """The U-Net's parameters that a sampler reads; None takes the few-step student where there is one."""
    if sampler is None:
        sampler = "perflow" if "student" in pipeline.params else "ddim"
    teacher = pipeline.params["unet"]
    return (pipeline.params.get("student", teacher) if sampler == "perflow" else teacher), sampler


def fewest_steps(pipeline: Pipeline, sampler: Sampler | None = None) -> int:
    """The fewest denoising steps that a sampler takes: one, or a student's windows."""
    return pipeline.flow.windows if unet_params(pipeline, sampler)[1] == "perflow" else 1


def noise_unit(rules: FeatureRules, vae: VAEConfig) -> Unit:
    """What the features' noise is relative to: under `paper`, one unit of the autoencoder's own latents."""
    return latent_unit(vae) if rules == "paper" else None


@functools.partial(jax.jit, static_argnames=("rules", "unit"))
def send(
    key: Key[Array, ""],
    z_BxHxWxC: Float[Array, "B H W C"],
    ratio: Float[Array, ""] | float,
    psnr_db: Float[Array, ""] | float,
    *,
    rules: FeatureRules = "default",
    unit: Unit = None,
) -> Received:
    """Merge, transmit and un-merge: Eqs. (15)-(19). One executable for every ratio and noise level.

    Args:
        key: `RequestKeys.link`, of the partition and the noise.
        z_BxHxWxC: latents.
        ratio: r, traced: beyond what the rules can merge (15/16; `paper` 0.75) it is clipped.
        psnr_db: of the features, traced; infinite is a perfect channel.
        rules: `default`: 2 x 2 patches, up to two rounds by Euclidean distance on the best of 16 partitions,
            noise on unit-power symbols. `paper`: strips, one round by cosine on one partition, noise of that
            standard deviation on un-normalised latents.
        unit: from `noise_unit`.

    Raises:
        MegError: a unit under `default`, or none under `paper`.
    """
    if (unit is None) != (rules == "default"):
        raise MegError(f"rules {rules}, unit {unit}: take the unit of noise_unit({rules!r}, ...)")
    layout = "patch" if rules == "default" else "strip"
    key_partition, key_noise = _link_keys(key)
    grid = merging.token_grid(*z_BxHxWxC.shape[1:3])
    tokens, ratio = merging.to_tokens(z_BxHxWxC, layout), jnp.asarray(ratio, jnp.float32)
    if rules == "default":
        # They lose least at equal bits (docs/merging-study.md); Eq. (15) has the cosine, on one partition.
        plan, _ = merging.match_best(tokens, key_partition, ratio, grid)
    else:
        plan = merging.match(tokens, key_partition, ratio, grid, rounds=1)
    unit_D = None if unit is None else jnp.array(4 * unit)
    received = transmit(key_noise, merging.merge(tokens, plan), psnr_db, plan.count, unit_D)
    return Received(merging.from_tokens(merging.unmerge(received, plan), grid, layout), plan.count)


@functools.partial(jax.jit, static_argnums=0)
def decode(pipeline: Pipeline, params: Params, z_BxHxWxC: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
    """Run a decoder of the pipeline's, Eq. (20); pictures clipped to [0, 1]."""
    return jnp.clip(pipeline.decoder_of(params)(params, z_BxHxWxC), 0.0, 1.0)


def finite(images: Float[np.ndarray, "*B H W 3"]) -> Float[np.ndarray, "*B H W 3"]:
    """Return pictures as they are; raises `MegError` if one is not finite, as where float16 overflows."""
    if not np.isfinite(images).all():
        raise MegError(
            "the picture is not finite: the networks overflow in this dtype; use one of wider range"
        )
    return images


@functools.partial(jax.jit, static_argnums=0)
def encode(
    pipeline: Pipeline, params: Params, image_BxHxWx3: Float[Array, "B H W 3"]
) -> Float[Array, "B h w c"]:
    """Run the VAE encoder on pictures in [0, 1]; returns the mean of the normalised latents."""
    return pipeline.vae_encoder(params, image_BxHxWx3)[0]
