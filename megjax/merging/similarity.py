"""How alike two tokens are: cosine, Eq. (15), or Euclidean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float


class Affine(NamedTuple):
    """A similarity S_ij = scale_i (gain_j a_i . b_j + bias_j) + offset_i of source i and destination j.

    The best j of each i needs only the bracket, so one matrix product serves every similarity. Each token has
    all four numbers; a source's are read by i, a destination's by j. None is 1 for a factor, 0 for a summand.
    """

    gain_N: Float[Array, "*b N"] | None = None
    bias_N: Float[Array, "*b N"] | None = None
    scale_N: Float[Array, "*b N"] | None = None
    """Positive, or 0 for a token that is equally like all."""
    offset_N: Float[Array, "*b N"] | None = None


Similarity: TypeAlias = Callable[[Float[Array, "*b N D"]], Affine]
"""Tokens to the coefficients of their similarity."""


def cosine(x_NxD: Float[Array, "*b N D"]) -> Affine:
    """Return cos(a_i, b_j), Eq. (15); a token of zeros has similarity 0 to all."""
    square_N = jnp.sum(x_NxD * x_NxD, axis=-1)
    inverse_norm_N = jnp.where(square_N > 0, 1 / jnp.sqrt(jnp.where(square_N > 0, square_N, 1.0)), 0.0)
    return Affine(gain_N=inverse_norm_N, scale_N=inverse_norm_N)


def euclidean(x_NxD: Float[Array, "*b N D"]) -> Affine:
    """Return -||a_i - b_j||^2 / 2, which orders pairs as the Euclidean distance does."""
    half_N = -0.5 * jnp.sum(x_NxD * x_NxD, axis=-1)
    return Affine(bias_N=half_N, offset_N=half_N)
