"""Distilling the device's decoder: it learns to undo merging, pruning and noise, Eq. (21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megjax.distill.pruning import gate, gate_kl, kept_count, message_rms, send_pruned, strongest
from megjax.link.channel import from_db
from megjax.link.features import FeatureRules
from megjax.models import Params
from megjax.pipeline.split import Unit, send
from megjax.training.step import Loss, Metrics

Degrade: TypeAlias = Callable[
    [Params, Key[Array, ""], Float[Array, "H W C"], Float[Array, ""], Float[Array, ""]],
    tuple[Float[Array, "H W C"], Float[Array, ""]],
]
"""(params, key, z, ratio, psnr_db) -> (what the device receives, a penalty), of one picture."""


Decode: TypeAlias = Callable[[Params, Float[Array, "B h w c"]], Float[Array, "B H W 3"]]
"""(params, z) -> pictures: a `Network`, or a function in its place."""


Objective: TypeAlias = Literal["mse", "quality"]
"""`mse`: Eq. (21). `quality`: the mean of log MSE, Eq. (22)'s reward with its sign turned."""


class Latents(NamedTuple):
    """What the decoder learns from, computed once.

    Args:
        z_NxTxHxWxC: each prompt's latents after every number of steps.
        picture_NxHxWx3: the picture of the longest run through the frozen decoder, in [0, 1].
    """

    z_NxTxHxWxC: Float[Array, "N T H W C"]
    picture_NxHxWx3: Float[Array, "N h w 3"]


class Ranges(NamedTuple):
    """What is drawn per sample, uniformly: the ratio and the features' PSNR."""

    ratio: tuple[float, float] = (0.0, 1.0)
    psnr_db: tuple[float, float] = (5.0, 20.0)


def merged(rules: FeatureRules = "default", unit: Unit = None) -> Degrade:
    """MEG: merge, transmit and un-merge, Eqs. (15)-(19). At ratio 0 it is MEG-Split-Finetune's channel."""

    def degrade(params: Params, key: Array, z: Array, ratio: Array, psnr_db: Array) -> tuple[Array, Array]:
        del params
        return send(key, z[None], ratio, psnr_db, rules=rules, unit=unit).z_BxHxWxC[0], jnp.zeros(())

    return degrade


def magnitude_pruned(unit: Unit = None) -> Degrade:
    """Send a latent's largest scalars; their index map is charged where bits are compared."""

    def degrade(params: Params, key: Array, z: Array, ratio: Array, psnr_db: Array) -> tuple[Array, Array]:
        del params
        x = z.reshape(-1)
        kept = strongest(jnp.abs(x), kept_count(ratio, x.size))
        return send_pruned(key, x, kept, psnr_db, unit).reshape(z.shape), jnp.zeros(())

    return degrade


def gated(kl_weight: float, unit: Unit = None) -> Degrade:
    """MEG-Pruning: y = gamma(sigma) z + noise, the least open scalars not sent.

    Args:
        kl_weight: beta, times the KL divergence summed over a latent.
        unit: see `Unit`.
    """

    def degrade(params: Params, key: Array, z: Array, ratio: Array, psnr_db: Array) -> tuple[Array, Array]:
        x = z.reshape(-1)
        gamma = gate(params["gate"], psnr_db)
        kept = strongest(jax.lax.stop_gradient(gamma), kept_count(ratio, x.size))
        # The channel's noise is relative to what is sent: with another one here, closing all gates alike
        # would cost nothing and please the penalty.
        rms = message_rms(gamma * x, kept) if unit is None else jnp.tile(jnp.array(unit), x.size // len(unit))
        sigma = from_db(-psnr_db / 2.0) * rms
        penalty = kl_weight * jnp.sum(gate_kl(gamma, x, sigma))
        return send_pruned(key, gamma * x, kept, psnr_db, unit).reshape(z.shape), penalty

    return degrade


def decoder_distillation_loss(
    decoder: Decode, degrade: Degrade, ranges: Ranges, objective: Objective = "mse"
) -> Loss:
    """Eq. (21): || y_ref - D_phi(received(z_T, r, noise)) ||^2, with T, r and the noise drawn per sample.

    Under `mse` the ratios near 1, with ten times the error of the others, are most of what is learned. Under
    `quality`, the paper's -log MSE, each sample counts by the share of its own error that is
    won; a penalty keeps its proportion to its sample's error.

    Args:
        decoder: of parameters `params["decoder"]`.
        degrade: what happens on the air; reads the other parameters.
        ranges: of ratio and PSNR.
        objective: `mse` or `quality`.

    Returns:
        A loss over `Latents`, a row a sample; among its metrics is the mean squared error of pixels.
    """

    def loss(params: Any, key: Key[Array, ""], data: Latents) -> tuple[Float[Array, ""], Metrics]:
        key_steps, key_ratio, key_psnr, key_air = jax.random.split(key, 4)
        N, steps = data.z_NxTxHxWxC.shape[:2]
        step_N = jax.random.randint(key_steps, (N,), 0, steps)
        ratio_N = jax.random.uniform(key_ratio, (N,), minval=ranges.ratio[0], maxval=ranges.ratio[1])
        psnr_N = jax.random.uniform(key_psnr, (N,), minval=ranges.psnr_db[0], maxval=ranges.psnr_db[1])
        z = jax.vmap(lambda z, step: z[step])(data.z_NxTxHxWxC, step_N).astype(jnp.float32)
        air = jax.vmap(degrade, in_axes=(None, 0, 0, 0, 0))
        received, penalty_N = air(params, jax.random.split(key_air, N), z, ratio_N, psnr_N)
        picture = data.picture_NxHxWx3.astype(jnp.float32)
        error_N = jnp.mean(jnp.square(decoder(params["decoder"], received) - picture), axis=(1, 2, 3))
        mse = jnp.mean(error_N)
        if objective == "mse":
            return mse + jnp.mean(penalty_N), {"mse": mse}
        bounded_N = jnp.maximum(error_N, 1e-8)
        log_mse_N = jnp.log(bounded_N) + penalty_N / jax.lax.stop_gradient(bounded_N)
        return jnp.mean(log_mse_N), {"mse": mse}

    return loss
