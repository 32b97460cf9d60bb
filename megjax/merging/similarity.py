"""How alike two tokens are: cosine, Eq. (15), or Euclidean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float


class Affine(NamedTuple):
    """A similarity as S_ij = scale_i (a_i . b_j + bias_j) + offset_i, scale_i > 0.

    The best j of each i needs only the bracket, so that one matrix product serves every similarity.
    """

    b_BxD: Float[Array, "*b B D"]
    bias_B: Float[Array, "*b B"] | None
    scale_A: Float[Array, "*b A"]
    offset_A: Float[Array, "*b A"] | None


Similarity: TypeAlias = Callable[[Float[Array, "*b A D"], Float[Array, "*b B D"]], Affine]
"""Sources and destinations to their similarity in affine form."""


def cosine(a_AxD: Float[Array, "*b A D"], b_BxD: Float[Array, "*b B D"]) -> Affine:
    """Return cos(a_i, b_j), Eq. (15); a token of zeros has similarity 0 to all."""
    return Affine(b_BxD * _inverse_norm(b_BxD)[..., None], None, _inverse_norm(a_AxD), None)


def euclidean(a_AxD: Float[Array, "*b A D"], b_BxD: Float[Array, "*b B D"]) -> Affine:
    """Return -||a_i - b_j||^2 / 2, which orders pairs as the Euclidean distance does."""
    half = -0.5 * jnp.sum(b_BxD * b_BxD, axis=-1)
    offset = -0.5 * jnp.sum(a_AxD * a_AxD, axis=-1)
    return Affine(b_BxD, half, jnp.ones_like(offset), offset)


def _inverse_norm(x_NxD: Float[Array, "*b N D"]) -> Float[Array, "*b N"]:
    square = jnp.sum(x_NxD * x_NxD, axis=-1)
    return jnp.where(square > 0, 1.0 / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
