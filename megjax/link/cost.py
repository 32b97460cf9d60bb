"""Latency and energy of one frame, Eqs. (1)-(7): computation at both ends and transmission."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

Real: TypeAlias = float | int | Shaped[Array, "..."]


class Workload(NamedTuple):
    """FLOPs of one image; the defaults are SDXL's at 1024 x 1024 with ToMe 0.5."""

    text_encoder_flops: Real = 0.11e12
    vae_encoder_flops: Real = 4.9e12
    """Charged for image-to-image only."""
    unet_call_flops: Real = 5.73e12
    """One U-Net call."""
    calls_per_step: Real = 2
    """U-Net calls: 1 at guidance 1, else 2; see the function `calls_per_step`."""
    vae_decoder_flops: Real = 10.5e12


SDXL = Workload()
SDXL_UNMERGED = SDXL._replace(unet_call_flops=6.76e12)
"""Without token merging in the U-Net."""


def calls_per_step(guidance: float) -> int:
    """Return the U-Net's calls of a step: both branches of guidance, at guidance 1 the prompt's alone."""
    return 1 if guidance == 1.0 else 2


class Compute(NamedTuple):
    """Eqs. (1)-(3) for one workload on one hardware: affine in the steps T, so eight numbers say it all."""

    es_fixed_s: Real
    """t0_es + F_enc / f_ES."""
    es_step_s: Real
    """F_unet / f_ES, seconds per denoising step."""
    ue_s: Real
    """t0_ue + F_dec / f_UE."""
    es_fixed_j: Real
    es_step_j: Real
    """zeta_es F_unet, joules per denoising step."""
    ue_j: Real
    """zeta_ue F_dec."""
    fixed_j: Real = 0.0
    """e0."""


class FrameCost(NamedTuple):
    """Every part of one frame's latency (s) and energy (J), Eqs. (1)-(7)."""

    latency_es_s: Float[Array, "*b"]
    latency_tx_s: Float[Array, "*b"]
    latency_ue_s: Float[Array, "*b"]
    latency_s: Float[Array, "*b"]
    energy_es_j: Float[Array, "*b"]
    energy_tx_j: Float[Array, "*b"]
    energy_ue_j: Float[Array, "*b"]
    energy_fixed_j: Float[Array, "*b"]
    energy_j: Float[Array, "*b"]


def frame_cost(
    compute: Compute,
    steps: Int[Array, "*b"] | Float[Array, "*b"] | int,
    payload_bits: Real,
    rate_bps: Real,
    tx_power_w: Real = 1.0,
) -> FrameCost:
    """Return the latency and energy of a frame, Eqs. (1)-(7); every argument may be traced.

    Args:
        compute: the hardware's costs for this workload, from `megjax.link.profiles.compute`.
        steps: denoising steps T_n.
        payload_bits: bits of the message, o_n included (`megjax.link.payload.payload_bits`).
        rate_bps: the link's rate in bit/s.
        tx_power_w: transmit power P in watts.
    """
    steps = jnp.asarray(steps, jnp.result_type(float))
    es_s = compute.es_fixed_s + compute.es_step_s * steps
    tx_s = jnp.asarray(payload_bits, steps.dtype) / rate_bps
    ue_s = jnp.asarray(compute.ue_s, steps.dtype)
    es_j = compute.es_fixed_j + compute.es_step_j * steps
    tx_j = tx_power_w * tx_s
    ue_j = jnp.asarray(compute.ue_j, steps.dtype)
    fixed_j = jnp.asarray(compute.fixed_j, steps.dtype)
    return FrameCost(
        es_s, tx_s, ue_s, es_s + tx_s + ue_s, es_j, tx_j, ue_j, fixed_j, es_j + tx_j + ue_j + fixed_j
    )
