"""What a frame costs: FLOPs counted from the program, bits of the message, seconds and joules on hardware."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from megjax import merging
from megjax.link import channel
from megjax.link.channel import DEFAULT_LINK
from megjax.link.cost import Compute, FrameCost, Workload, calls_per_step, frame_cost
from megjax.link.payload import rgb_bits
from megjax.link.profiles import AnyProfile, StepProfile, compute
from megjax.models import (
    UNetConfig,
    VAEConfig,
)
from megjax.pipeline.load import Pipeline
from megjax.pipeline.workload import workload

TABLE2_RATE_BPS = 0.83235e6
"""The mean rate that all of Table II's transmission figures follow from."""

SDXL_LATENT = (UNetConfig().sample_size, UNetConfig().sample_size, VAEConfig().latent_channels)
SDXL_PICTURE = (VAEConfig().sample_size, VAEConfig().sample_size)


class Scale(NamedTuple):
    """A model's sizes and FLOPs, which a frame is charged by."""

    name: str
    picture: tuple[int, int]
    """Height and width; pixels."""
    latent: tuple[int, int, int]
    """Height, width and channels."""
    plain: Workload
    """FLOPs of a frame without token merging in the U-Net."""
    tome: Workload
    """With it."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        return merging.token_grid(*self.latent[:2])

    @property
    def raw_bits(self) -> int:
        """A picture as 16-bit RGB."""
        return rgb_bits(*self.picture)


def real(x: Any) -> float:
    """Return a number that may be an array's."""
    return float(np.asarray(x))


def count(pipeline: Pipeline, tome_ratio: float) -> dict[str, Any]:
    """Return the FLOPs of every part of one frame, counted from the lowered programs.

    Every method is charged the undistilled decoder, MEG too where its own is thinner.
    """
    pipeline = dataclasses.replace(pipeline, thin={})
    side, latent = pipeline.image_size, pipeline.unet.config.sample_size
    plain, merged = (workload(pipeline, (side, side), ratio) for ratio in (0.0, tome_ratio))
    return {
        "picture": [side, side],
        "latent": [latent, latent, pipeline.vae_decoder.config.latent_channels],
        "text_encoder_flops": real(plain.text_encoder_flops),
        "vae_encoder_flops": real(plain.vae_encoder_flops),
        "unet_call_flops": real(plain.unet_call_flops),
        "unet_call_tome_flops": real(merged.unet_call_flops),
        "vae_decoder_flops": real(plain.vae_decoder_flops),
    }


def scale(name: str, counted: dict[str, Any], guidance: float) -> Scale:
    """Return the record of counted FLOPs as what a frame is charged by under a guidance."""
    parts = {k: counted[k] for k in ("text_encoder_flops", "vae_encoder_flops", "vae_decoder_flops")}
    plain, merged = (
        Workload(unet_call_flops=counted[k], calls_per_step=calls_per_step(guidance), **parts)
        for k in ("unet_call_flops", "unet_call_tome_flops")
    )
    return Scale(name, tuple(counted["picture"]), tuple(counted["latent"]), plain, merged)


def draw_channels(seed: int, frames: int) -> Float[np.ndarray, " P"]:
    """Return the linear gain-to-noise ratios of frames at distances drawn anew, every method's alike."""
    distance_m = channel.sample_distance_m(jax.random.key(seed), DEFAULT_LINK, (frames,))
    return np.asarray(channel.snr(distance_m), np.float64)


def computation(profile: AnyProfile, scale: Scale, *, tome: bool, centralised: bool = False) -> Compute:
    """Return a frame's computation on hardware; a centralised server decodes too, the device does nothing."""
    work = scale.tome if tome else scale.plain
    if centralised and not isinstance(profile, StepProfile):  # whose fixed part is the decoding already
        moved = work.text_encoder_flops + work.vae_decoder_flops
        found = compute(profile, work._replace(text_encoder_flops=moved, vae_decoder_flops=0.0))
        return found._replace(ue_s=0.0)
    return compute(profile, work, tome=tome)


def costs(
    computation: Compute, steps: Any, bits: Any, snr_P: Float[np.ndarray, " P"]
) -> dict[str, Float[np.ndarray, " P"]]:
    """Return every part of the latency and energy of frames over their channels, Eqs. (1)-(7)."""
    rate_bps = np.asarray(channel.rate_bps(jnp.asarray(snr_P)), np.float64)
    power_w = float(channel.tx_power_w())
    given = jnp.asarray(steps), jnp.asarray(bits, float), jnp.asarray(rate_bps)
    found: FrameCost = frame_cost(computation, *given, power_w)
    return {k: np.broadcast_to(np.asarray(v, np.float64), snr_P.shape) for k, v in found._asdict().items()}
