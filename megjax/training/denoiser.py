"""Training the U-Net and its text encoders together, from nothing, to predict noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from megjax.diffusion import Schedule, encode_text, noised
from megjax.models import Network
from megjax.training.step import Loss, Metrics


class Emphasis(NamedTuple):
    """Which errors count.

    Args:
        lowest: timesteps below are not drawn; the others all alike.
        max_weight: of a timestep, at most.
    """

    lowest: int = 0
    max_weight: float = 10.0


COARSE = Emphasis(850, float("inf"))
"""From timestep 850, where layout is decided; an error in eps counts as the one that it makes in z_0."""


class Captioned(NamedTuple):
    """Latents and their captions.

    Args:
        z0_NxHxWxC: normalised latents.
        ids_NxL: token ids.
    """

    z0_NxHxWxC: Float[Array, "N H W C"]
    ids_NxL: Int[Array, "N L"]


def denoiser_loss(
    unet: Network,
    text_encoders: tuple[Network, Network],
    schedule: Schedule,
    *,
    size: tuple[int, int],
    empty_L: Int[Array, " L"],
    text_drop: float,
    batch: int,
    emphasis: Emphasis,
) -> Loss:
    """Weighted noise prediction: w(t) || eps_theta(z_t, t, text) - n ||^2, w = min(1/abar_t, max_weight).

    The weight makes it an error in velocity, up to its bound.

    Args:
        unet: of parameters `params["unet"]`.
        text_encoders: of parameters `params["text_encoder"]` and `params["text_encoder_2"]`.
        schedule: the noise schedule.
        size: height and width of the pictures; pixels.
        empty_L: token ids of the empty prompt.
        text_drop: share of captions replaced by the empty prompt, for classifier-free guidance.
        batch: pictures a step, drawn from the data with replacement.
        emphasis: which timesteps are drawn, and the weight's bound.

    Returns:
        A loss over `Captioned` data.
    """
    S = len(schedule.abar)
    weight_S = jnp.minimum(1.0 / schedule.abar, emphasis.max_weight)
    weight_S = weight_S / jnp.mean(weight_S[emphasis.lowest :])

    def loss(params: Any, key: Key[Array, ""], data: Captioned) -> tuple[Float[Array, ""], Metrics]:
        key_pick, key_t, key_noise, key_drop = jax.random.split(key, 4)
        rows = jax.random.randint(key_pick, (batch,), 0, len(data.ids_NxL))
        z0 = data.z0_NxHxWxC[rows].astype(jnp.float32)
        dropped = jax.random.bernoulli(key_drop, text_drop, (batch, 1))
        ids = jnp.where(dropped, empty_L[None, :], data.ids_NxL[rows])
        t = jax.random.randint(key_t, (batch,), emphasis.lowest, S)
        noise = jax.random.normal(key_noise, z0.shape, z0.dtype)

        text_params = (params["text_encoder"], params["text_encoder_2"])
        condition = encode_text(text_encoders, text_params, (ids, ids), size)
        eps = unet(params["unet"], noised(schedule, z0, noise, t), t, *condition)
        error_B = jnp.mean(jnp.square(eps - noise), axis=(1, 2, 3))
        return jnp.mean(weight_S[t] * error_B), {"eps_mse": jnp.mean(error_B)}

    return loss
