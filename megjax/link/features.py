"""Merged tokens as analogue symbols on the air: 16 bits, unit power, white Gaussian noise, Eq. (19).

`psnr_db` sets the noise on the features and the link's `snr` sets the rate. The paper has both: bits over a
Shannon link, and analogue noise on the same features as a model of residual error. `psnr_from_snr` ties them.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from megjax.link.channel import DEFAULT_LINK, LinkParams, Real, from_db, to_db

FeatureRules: TypeAlias = Literal["default", "paper"]
"""default: noise relative to the message's power. paper: noise of that level on un-normalised latents."""
PSNR_DB: dict[FeatureRules, float] = {"default": 10.0, "paper": 20.0}
"""The features' usual noise level; the authors' is a standard deviation of 0.1."""
FeatureDtype: TypeAlias = Literal["float16", "bfloat16"]


def transmit(
    key: PRNGKeyArray,
    tokens_MxD: Float[Array, "*b M D"],
    psnr_db: Real,
    count: Int[Array, "*b"] | int | None = None,
    unit_D: Float[ArrayLike, " D"] | None = None,
    dtype: FeatureDtype = "float16",
) -> Float[Array, "*b M D"]:
    """Send merged tokens through the noisy channel, Eq. (19): received = Z' + noise.

    Quantise to 16 bits; p = mean square of Z' per message, one float32 free of noise; symbols Z' / sqrt(p);
    noise N(0, sigma^2), sigma = 10^(-psnr_db / 20), on every scalar; times sqrt(p). Under the rules `paper`
    a unit stands in for sqrt(p): 20 dB is then the authors' standard deviation of 0.1 on un-normalised
    latents. Gradients pass through the quantisation unchanged.

    Args:
        key: noise key.
        tokens_MxD: merged tokens; rows from `count` on are padding.
        psnr_db: peak signal-to-noise ratio in dB, one number or one per message.
        count: valid rows, N - R; None is all of them. Padding comes back as zeros.
        unit_D: what one unit of an un-normalised token is in these; None takes the message's own power.
        dtype: the 16-bit format. Values beyond float16's 65504 saturate; `wire.encode` refuses them.
    """
    batch, (rows, channels) = tokens_MxD.shape[:-2], tokens_MxD.shape[-2:]
    x = tokens_MxD.astype(jnp.float32)
    if count is not None:
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), batch)
        valid = jnp.arange(rows).reshape((1,) * len(batch) + (rows,)) < count[..., None]
        x = jnp.where(valid[..., None], x, 0.0)
    x = quantise(x, dtype)
    sigma = jnp.broadcast_to(from_db(-jnp.asarray(psnr_db, jnp.float32) / 2.0), batch)
    scale = sigma[..., None, None]
    if unit_D is None:
        scalars = rows * channels if count is None else jnp.maximum(count, 1) * channels
        power = jnp.sum(x**2, axis=(-2, -1)) / scalars
        # An all-zero message has no power, hence no noise; its root must not have an infinite slope.
        scale = scale * jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0)[..., None, None]
    else:
        scale = scale * jnp.asarray(unit_D, jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    noise = scale * jax.random.normal(key, x.shape, x.dtype)
    if count is not None:
        noise = jnp.where(valid[..., None], noise, 0.0)
    return (x + noise).astype(tokens_MxD.dtype)


def quantise(x: Float[Array, "*b"], dtype: FeatureDtype = "float16") -> Float[Array, "*b"]:
    """Round to a 16-bit float and back, saturating; the gradient passes the rounding unchanged."""
    limit = float(jnp.finfo(dtype).max)
    x = jnp.clip(x, -limit, limit)
    return x + jax.lax.stop_gradient(x.astype(dtype).astype(x.dtype) - x)


def psnr_from_snr(
    snr: Real, params: LinkParams = DEFAULT_LINK, margin_db: Real = 0.0
) -> Float[Array, "*shape"]:
    """Return the PSNR in dB of features that meet the bits' channel state: snr / gap, and a margin."""
    return to_db(snr) - params.snr_gap_db + margin_db
