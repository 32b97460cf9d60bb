"""Conditioning of the U-Net on text and sizes, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from megjax.diffusion.ddim import Denoise
from megjax.models import Network, Params, TokenMerge, time_ids

UNetCall = Callable[..., Float[Array, "B H W C"]]
"""(params, z_t, t, text, pooled, sizes, token_merge) -> eps: a `Network`, or a function in its place."""


class Conditioning(NamedTuple):
    """What the U-Net is told beside z_t and t.

    Args:
        text_BxLxE: penultimate hidden states of the text encoders, side by side.
        pooled_BxP: pooled embedding of the last text encoder.
        sizes_Bx6: original size, crop, target size; pixels.
    """

    text_BxLxE: Float[Array, "B L E"]
    pooled_BxP: Float[Array, "B P"]
    sizes_Bx6: Num[Array, "B 6"]


def encode_text(
    encoders: tuple[Network, Network],
    params: tuple[Params, Params],
    ids: tuple[Int[Array, "B L"], Int[Array, "B L"]],
    size: tuple[int, int],
) -> Conditioning:
    """SDXL's conditioning: both penultimate states side by side, and the second encoder's pooled output.

    Args:
        encoders: both text encoders.
        params: theirs.
        ids: token ids for each.
        size: height and width of the picture; pixels.
    """
    (text_1, _), (text_2, pooled) = (
        encoder(p, i) for encoder, p, i in zip(encoders, params, ids, strict=True)
    )
    return Conditioning(jnp.concatenate([text_1, text_2], axis=-1), pooled, time_ids(*size, len(pooled)))


def conditioned(
    unet: UNetCall, params: Params, condition: Conditioning, token_merge: TokenMerge | None = None
) -> Denoise:
    """The conditional noise predictor: one U-Net call a step."""
    return lambda z, t_B: unet(params, z, t_B, *condition, token_merge)


def guided(
    unet: UNetCall,
    params: Params,
    condition: Conditioning,
    empty: Conditioning,
    guidance: Float[Array, ""] | float,
    token_merge: TokenMerge | None = None,
) -> Denoise:
    """Classifier-free guidance, eps_u + g (eps_c - eps_u); both branches in one call of twice the batch.

    Args:
        unet: the U-Net.
        params: its parameters.
        condition: of the prompts.
        empty: of the empty or negative prompts.
        guidance: g, traced; at 1 `conditioned` gives the same for half the price.
        token_merge: ToMe inside self-attention.
    """
    both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), empty, condition)

    def denoise(z: Array, t_B: Array) -> Array:
        eps = unet(params, jnp.concatenate([z, z]), jnp.concatenate([t_B, t_B]), *both, token_merge)
        eps_u, eps_c = jnp.split(eps, 2)
        return eps_u + guidance * (eps_c - eps_u)

    return denoise
