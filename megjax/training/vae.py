"""Training the autoencoder: reconstruction and a slight pull of the latents towards a unit Gaussian."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megjax.models import Network, Params
from megjax.training.step import Loss, Metrics


def autoencoder_loss(encoder: Network, decoder: Network, kl_weight: float) -> Loss:
    """Mean squared error plus `kl_weight` times the KL divergence, both summed over a picture, a pixel value.

    Args:
        encoder: of parameters `params["encoder"]`.
        decoder: of parameters `params["decoder"]`.
        kl_weight: latent diffusion's convention; 1e-6 hardly disturbs the reconstruction.

    Returns:
        A loss over batches of pictures, (B, H, W, 3) in [0, 1].
    """

    def loss(
        params: Any, key: Key[Array, ""], image_BxHxWx3: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, ""], Metrics]:
        mean, logvar = encoder(params["encoder"], image_BxHxWx3)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
        error = jnp.mean(jnp.square(decoder(params["decoder"], z) - image_BxHxWx3))
        kl = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar) / len(mean)
        return error + kl_weight * kl / image_BxHxWx3[0].size, {"mse": error, "kl": kl}

    return loss


def decoder_loss(encoder: Network, decoder: Network, encoder_params: Params) -> Loss:
    """Mean squared error of the decoder alone, on the latents of a finished encoder.

    Args:
        encoder: frozen.
        decoder: of the parameters that are trained.
        encoder_params: of the encoder.

    Returns:
        A loss over batches of pictures, (B, H, W, 3) in [0, 1].
    """

    def loss(
        params: Any, key: Key[Array, ""], image_BxHxWx3: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, ""], Metrics]:
        del key
        mean, _ = encoder(encoder_params, image_BxHxWx3)
        return jnp.mean(jnp.square(decoder(params, mean) - image_BxHxWx3)), {}

    return loss
