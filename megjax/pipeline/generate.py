"""One request through the split: a prompt in, the device's picture and what it cost out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from megjax.checks import LARGEST_SEED, within
from megjax.errors import MegError
from megjax.link.cost import calls_per_step
from megjax.link.features import PSNR_DB, FeatureRules
from megjax.link.payload import payload_bits
from megjax.merging import token_grid
from megjax.models import Params
from megjax.pipeline.load import Pipeline
from megjax.pipeline.split import (
    Sampler,
    condition,
    decode,
    denoise,
    encode,
    fewest_steps,
    finite,
    noise_unit,
    request_keys,
    send,
    unet_params,
)
from megjax.text import tokenize

REFERENCE_STEPS = 12
"""T_max: the reference picture's steps."""

MAX_RATIO = {"default": 15 / 16, "paper": 1.0}

MAX_ENLARGEMENT = 4
"""Largest side over the model's own: attention's memory grows with its fourth power."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate and how to send it.

    Args:
        prompt: what the picture shows.
        negative_prompt: what guidance leads away from.
        steps: denoising steps T.
        ratio: merging ratio r.
        psnr_db: of the features on the channel; `inf` is a perfect one, None the rules' own (`PSNR_DB`).
        guidance: of classifier-free guidance.
        seed: of the noise, the partition and the channel.
        rules: `default`, or `paper` for the authors' noise and layout.
        sampler: `perflow`, `ddim`, or None for the few-step student where the backbone has one.
        tome_ratio: of the tokens merged inside the U-Net's self-attention, for speed.
        strength: with a picture to start from, how far to leave it: 1 forgets it.
        height: of the picture, pixels; None is the model's own.
        width: likewise.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 8
    ratio: float = 0.4
    psnr_db: float | None = None
    guidance: float = 2.5
    seed: int = 0
    rules: FeatureRules = "default"
    sampler: Sampler | None = None
    tome_ratio: float = 0.0
    strength: float = 0.6
    height: int | None = None
    width: int | None = None

    @property
    def feature_psnr_db(self) -> float:
        """The noise level in force."""
        return PSNR_DB[self.rules] if self.psnr_db is None else self.psnr_db


class Generated(NamedTuple):
    """The device's picture beside the clean reference.

    Args:
        image_HxWx3: what the device shows, in [0, 1].
        reference_HxWx3: T = 12, same seed and guidance, nothing merged, perfect channel, undistilled decoder.
        tokens: N - R, sent.
        payload_bits: of the message, side information included.
        mse: between both pictures.
        psnr_db: the same in dB.
    """

    image_HxWx3: Float[np.ndarray, "H W 3"]
    reference_HxWx3: Float[np.ndarray, "H W 3"]
    tokens: int
    payload_bits: int
    mse: float
    psnr_db: float


def check_values(request: Request) -> None:
    """Refuse what can be told without a model.

    Raises:
        MegError: naming the value and what is allowed.
    """
    if request.rules not in get_args(FeatureRules):
        raise MegError(f"rules {request.rules!r}: choose from {', '.join(get_args(FeatureRules))}")
    if request.sampler not in (None, *get_args(Sampler)):
        raise MegError(f"sampler {request.sampler!r}: choose from {', '.join(get_args(Sampler))}")
    if type(request.steps) is not int:
        raise MegError(f"steps {request.steps}: a whole number is allowed")
    if not 0 <= request.tome_ratio <= 0.75:
        raise MegError(f"tome_ratio {request.tome_ratio}: from 0 to 0.75 are allowed")
    limit = MAX_RATIO[request.rules]
    if not 0 <= request.ratio <= limit:
        raise MegError(f"ratio {request.ratio}: from 0 to {limit} are allowed")
    if not request.feature_psnr_db >= -100:
        raise MegError(f"psnr_db {request.psnr_db}: from -100 dB to inf, a perfect channel, are allowed")
    if not math.isfinite(request.guidance) or request.guidance < 0:
        raise MegError(f"guidance {request.guidance}: finite numbers from 0 on are allowed")
    if not 0 < request.strength <= 1:
        raise MegError(f"strength {request.strength}: above 0, up to 1 is allowed")
    within(request, 0, LARGEST_SEED, "seed")


def check(request: Request, pipeline: Pipeline) -> None:
    """Refuse what this pipeline cannot generate.

    Raises:
        MegError: naming the value and what is allowed.
    """
    check_values(request)
    if request.sampler == "perflow" and "student" not in pipeline.params:
        raise MegError(f"sampler perflow: {pipeline.name} has no few-step student; take ddim, or distil one")
    fewest = fewest_steps(pipeline, request.sampler)
    if fewest > REFERENCE_STEPS:
        raise MegError(
            f"{pipeline.name}: its student has {fewest} windows, and the reference is of {REFERENCE_STEPS} "
            "steps; take a student of fewer windows, or the sampler ddim"
        )
    longest = len(pipeline.schedule.abar)
    if not fewest <= request.steps <= longest:
        raise MegError(f"steps {request.steps}: from {fewest} to {longest} are allowed")
    # Two latent pixels a token, and every level of the U-Net halves them once more.
    multiple = pipeline.vae_decoder.config.downsampling * 2 ** max(
        1, len(pipeline.unet.config.block_out_channels) - 1
    )
    for name in ("height", "width"):
        value = getattr(request, name)
        most = MAX_ENLARGEMENT * pipeline.image_size
        if value is not None and (not multiple <= value <= most or value % multiple):
            raise MegError(f"{name} {value}: multiples of {multiple} pixels up to {most} are allowed")


def generate(
    pipeline: Pipeline,
    request: Request,
    init_image_HxWx3: Float[np.ndarray, "H W 3"] | None = None,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Generated:
    """Generate one picture through the split, Eq. (8), and its clean reference.

    Args:
        pipeline: from `load_pipeline`.
        request: what to generate.
        init_image_HxWx3: picture in [0, 1] to start from (SDEdit); resized by the caller.
        on_stage: told each stage before it runs.

    Raises:
        MegError: for a request that cannot be generated, see `check`, a prompt too long or empty, or a
            picture that is not finite in the networks' dtype.
    """
    return next(generate_each(pipeline, [request], init_image_HxWx3, on_stage=on_stage))


def generate_each(
    pipeline: Pipeline,
    requests: Sequence[Request],
    init_image_HxWx3: Float[np.ndarray, "H W 3"] | None = None,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Iterator[Generated]:
    """Generate requests that differ in steps, ratio and PSNR alone, as `generate` does.

    Each number of steps is denoised once, and all share one reference.

    Args:
        pipeline: from `load_pipeline`.
        requests: what to generate, at least one.
        init_image_HxWx3: see `generate`.
        on_stage: see `generate`.

    Yields:
        Each request's pictures, in turn.

    Raises:
        MegError: see `generate`; requests that differ in something else.
    """
    if not requests:
        raise MegError("requests: give at least one")
    first = requests[0]
    for request in requests:
        check(request, pipeline)
        if request != dataclasses.replace(
            first, steps=request.steps, ratio=request.ratio, psnr_db=request.psnr_db
        ):
            raise MegError(
                "requests: they may differ in steps, ratio and psnr_db alone; generate others apart"
            )
    vae = pipeline.vae_decoder.config
    height, width = (side // vae.downsampling for side in picture_size(pipeline, first))
    grid, channels = token_grid(height, width), vae.latent_channels
    # Before anything runs: a ratio may be beyond what so small a grid can merge.
    bits = [
        payload_bits(request.ratio, grid[0] * grid[1], 4 * channels, rules=request.rules, grid=grid)
        for request in requests
    ]
    latents = _denoiser(pipeline, first, init_image_HxWx3, on_stage)
    # The authors' reference merges tokens in the U-Net, too.
    unit = noise_unit(first.rules, pipeline.vae_decoder.config)
    reference_tome = first.tome_ratio if first.rules == "paper" else 0.0
    key_link = request_keys(first.seed).link
    on_stage("reference")
    reference = _picture(pipeline, pipeline.params["vae_decoder"], latents(REFERENCE_STEPS, reference_tome))
    for request, payload in zip(requests, bits, strict=True):
        z_1xHxWxC = latents(request.steps, request.tome_ratio)
        on_stage("channel")
        psnr_db = request.feature_psnr_db
        received = send(key_link, z_1xHxWxC, request.ratio, psnr_db, rules=request.rules, unit=unit)
        on_stage("VAE decoder")
        image = _picture(pipeline, pipeline.device_decoder, received.z_BxHxWxC)
        mse = float(np.mean(np.square(image - reference), dtype=np.float64))
        found_db = -10 * math.log10(mse) if mse else math.inf
        yield Generated(image, reference, int(received.tokens_B[0]), int(payload), mse, found_db)


def picture_size(pipeline: Pipeline, request: Request) -> tuple[int, int]:
    """Height and width of a request's picture, the model's own unless given; pixels."""
    return request.height or pipeline.image_size, request.width or pipeline.image_size


def _denoiser(
    pipeline: Pipeline,
    request: Request,
    init_image_HxWx3: np.ndarray | None,
    on_stage: Callable[[str], None],
) -> Callable[[int, float], jax.Array]:
    """Encode prompt and picture; return the latents as a function of the steps and the ToMe ratio."""
    height, width = picture_size(pipeline, request)
    if init_image_HxWx3 is not None:
        _check_picture(init_image_HxWx3, (height, width, 3))
    ids = tokenize(pipeline.tokenizers, [request.prompt])
    empty_ids = tokenize(pipeline.tokenizers, [request.negative_prompt], "negative_prompt", allow_empty=True)
    params = pipeline.params

    on_stage("text encoders")
    read = (ids, empty_ids)[: calls_per_step(request.guidance)]
    prompt, *empty = (condition(pipeline, params, jnp.asarray(i), size=(height, width)) for i in read)
    config = pipeline.vae_decoder.config
    latent = (1, height // config.downsampling, width // config.downsampling, config.latent_channels)
    # A seed's picture is the same whatever JAX's default dtype is.
    noise = jax.random.normal(request_keys(request.seed).noise, latent, jnp.float32)
    if init_image_HxWx3 is None:
        start, strength = jnp.zeros(latent, jnp.float32), 1.0
    else:
        on_stage("VAE encoder")
        start = encode(pipeline, params["vae_encoder"], jnp.asarray(init_image_HxWx3, jnp.float32)[None])
        strength = request.strength
    unet, sampler = unet_params(pipeline, request.sampler)

    @functools.cache
    def latents(steps: int, tome_ratio: float) -> jax.Array:
        on_stage(f"U-Net, {steps} steps")
        return denoise(
            pipeline,
            unet,
            noise,
            prompt,
            empty[0] if empty else None,
            steps,
            request.guidance,
            start,
            strength,
            sampler=sampler,
            tome_ratio=tome_ratio,
        )

    return latents


def _check_picture(image_HxWx3: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Refuse a picture to start from that is not one."""
    if image_HxWx3.shape != shape:
        raise MegError(f"the picture to start from is {image_HxWx3.shape}; resize it to {shape}")
    # Written so that NaN is refused.
    if not (
        np.issubdtype(image_HxWx3.dtype, np.floating) and 0 <= image_HxWx3.min() <= image_HxWx3.max() <= 1
    ):
        raise MegError(
            f"the picture to start from is {image_HxWx3.dtype}, {image_HxWx3.min()} to {image_HxWx3.max()}; "
            "give numbers from 0 to 1 (of bytes, divide by 255)"
        )


def _picture(pipeline: Pipeline, decoder: Params, z_1xHxWxC: jax.Array) -> np.ndarray:
    return finite(np.asarray(decode(pipeline, decoder, z_1xHxWxC)[0]))
