"""Teaching the text encoders, before the U-Net learns, to say where in a picture what is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megjax.diffusion import encode_text
from megjax.models import Network
from megjax.training.denoiser import Captioned
from megjax.training.step import Loss, Metrics


def layout_loss(
    text_encoders: tuple[Network, Network], head: Network, *, size: tuple[int, int], batch: int
) -> Loss:
    """Squared error of the blurred latent that the head reads from a caption's embeddings.

    Which of two objects is left of the other shows in the noisiest of noisy latents alone, and as one bit of
    word order and relation together: the U-Net's gradient towards it drowns in the rest. Here it is most of
    what is left to learn once the colours are known, at a thirtieth of a denoising step's price.

    Args:
        text_encoders: of parameters `params["text_encoder"]` and `params["text_encoder_2"]`.
        head: of parameters `params["layout"]`, see `megjax.models.layout`.
        size: height and width of the pictures; pixels.
        batch: pictures a step, drawn from the data with replacement.

    Returns:
        A loss over `Captioned` data.
    """

    def loss(params: Any, key: Key[Array, ""], data: Captioned) -> tuple[Float[Array, ""], Metrics]:
        rows = jax.random.randint(key, (batch,), 0, len(data.ids_NxL))
        ids = data.ids_NxL[rows]
        z0 = data.z0_NxHxWxC[rows].astype(jnp.float32)
        text_params = (params["text_encoder"], params["text_encoder_2"])
        condition = encode_text(text_encoders, text_params, (ids, ids), size)
        drawn = head(params["layout"], condition.text_BxLxE, condition.pooled_BxP)
        B, h, w, C = drawn.shape
        coarse = jnp.mean(z0.reshape(B, h, z0.shape[1] // h, w, z0.shape[2] // w, C), axis=(2, 4))
        return jnp.mean(jnp.square(drawn - coarse)), {}

    return loss
