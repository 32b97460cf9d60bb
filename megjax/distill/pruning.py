"""Pruning instead of merging: the variational gate of MEG-Pruning (arXiv 2102.04170), and by magnitude."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from megjax.link.channel import Real, from_db
from megjax.link.features import quantise
from megjax.models import Params
from megjax.pipeline.split import Unit

KL_FIT = (0.63576, 1.87320, 1.48695)
"""k1, k2, k3 of the fit to the KL divergence from the log-uniform prior (within 0.01 of quadrature)."""


def init_gate(key: Key[Array, ""], size: int, hidden: int = 64) -> Params:
    """Parameters of the gate: an MLP from the noise level to `size` = C H W logits, open at the start."""
    key_in, key_out = jax.random.split(key)
    return {
        "in": {"kernel": jax.random.normal(key_in, (1, hidden)), "bias": jnp.zeros(hidden)},
        "out": {
            "kernel": 0.1 * jax.random.normal(key_out, (hidden, size)) / hidden**0.5,
            "bias": jnp.full(size, 2.0),
        },
    }


def gate(params: Params, psnr_db: Real) -> Float[Array, " n"]:
    """gamma(sigma) in [0, 1] of every scalar of a latent, from the noise level, which both ends know."""
    x = jnp.reshape(jnp.asarray(psnr_db, jnp.float32) / 20.0, (1, 1))
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None, :])
    return jax.nn.sigmoid(hidden @ params["out"]["kernel"] + params["out"]["bias"][None, :])[0]


def gate_kl(gamma: Float[Array, "*n"], x: Float[Array, "*n"], sigma: Real) -> Float[Array, "*n"]:
    """KL of N(gamma x, sigma^2) from the log-uniform prior, up to a constant.

    With a = sigma^2/(gamma x)^2: 0.5 log(1 + 1/a) - k1 (sigmoid(k2 + k3 log a) - 1).
    """
    k1, k2, k3 = KL_FIT
    # 1/a, kept off 0 so that a silent scalar has a finite slope, and sigma off it where nothing is sent.
    inverse = jnp.square(gamma * x / jnp.maximum(sigma, 1e-8)) + 1e-8
    return 0.5 * jnp.log1p(inverse) - k1 * (jax.nn.sigmoid(k2 - k3 * jnp.log(inverse)) - 1.0)


def kept_count(ratio: Real, size: int) -> Shaped[Array, ""]:
    """How many of `size` scalars are sent at a pruning ratio: size - floor(float32(r) size + 1e-4)."""
    pruned = jnp.floor(jnp.asarray(ratio, jnp.float32) * size + 1e-4).astype(jnp.int32)
    return size - jnp.clip(pruned, 0, size - 1)


def strongest(score_n: Float[Array, " n"], count: Shaped[Array, ""]) -> Bool[Array, " n"]:
    """Which scalars are sent: the `count` of highest score, the first of equal ones."""
    n = score_n.shape[0]
    order = jnp.argsort(-score_n, stable=True)
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    return rank < count


def message_rms(x_n: Float[Array, " n"], kept_n: Bool[Array, " n"]) -> Float[Array, ""]:
    """Root mean square of the kept scalars, which the channel's noise is relative to."""
    power = jnp.sum(jnp.where(kept_n, jnp.square(x_n), 0.0)) / jnp.maximum(kept_n.sum(), 1)
    # An all-zero message has no power, hence no noise; its root must not have an infinite slope.
    return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1.0)), 0.0)


def send_pruned(
    key: Key[Array, ""],
    x_n: Float[Array, " n"],
    kept_n: Bool[Array, " n"],
    psnr_db: Real,
    unit: Unit = None,
) -> Float[Array, " n"]:
    """Send the kept scalars as 16-bit symbols of unit power through the noise; the rest arrive as zeros.

    Args:
        key: of the noise.
        x_n: a latent's scalars, channels last.
        kept_n: which are sent.
        psnr_db: of the features.
        unit: see `megjax.pipeline.split.noise_unit`.
    """
    x_n = quantise(x_n)
    sigma = from_db(-jnp.asarray(psnr_db, jnp.float32) / 2.0)
    rms = message_rms(x_n, kept_n) if unit is None else jnp.tile(jnp.array(unit), x_n.size // len(unit))
    sigma = sigma * rms
    return jnp.where(kept_n, x_n + sigma * jax.random.normal(key, x_n.shape, x_n.dtype), 0.0)
