"""What a picture sent with T steps, ratio r and a feature PSNR is worth: the MSE behind Eq. (22)'s reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from megjax.errors import MegError

QualitySource: TypeAlias = Callable[
    [PRNGKeyArray, Float[Array, ""], Float[Array, ""], Float[Array, ""]], Float[Array, ""]
]
"""(key, steps, ratio, psnr_db) -> MSE against the reference, all scalars and traced.

The key draws what is random about a frame: the picture and the noise. An analytic surface, a measured table
and the live decoder are three such functions.
"""

Axis: TypeAlias = Sequence[float | int] | np.ndarray


def analytic_mse(
    key: PRNGKeyArray, steps: Float[Array, ""], ratio: Float[Array, ""], psnr_db: Float[Array, ""]
) -> Float[Array, ""]:
    """Return the MSE of the reference problem `analytic`: 0.008 + 0.012 exp(-(T - 4) / 2.5) + 0.02 r^2."""
    return 0.008 + 0.012 * jnp.exp((4.0 - steps) / 2.5) + 0.02 * ratio**2


def table_mse(
    table_PxTxRxS: np.ndarray | Array,
    steps: Axis,
    ratios: Axis,
    psnrs_db: Axis,
) -> QualitySource:
    """Return a source that draws a picture and interpolates its measured MSE, multilinear in log MSE.

    Log MSE, because the reward is: between two measured points the reward is then linear. Outside the table's
        range the
    nearest edge is used.

    Args:
        table_PxTxRxS: MSE of each picture at each step count, ratio and PSNR; positive.
        steps, ratios, psnrs_db: the axes, increasing.

    Raises:
        MegError: axes that do not fit the table or do not increase, or an MSE that is not positive and
            finite.
    """
    axes = [np.asarray(axis, float) for axis in (steps, ratios, psnrs_db)]
    values = np.asarray(table_PxTxRxS, float)
    expected = tuple(len(axis) for axis in axes)
    if values.ndim != 4 or values.shape[1:] != expected:
        raise MegError(f"quality table of shape {values.shape}: its axes need (pictures, *{expected})")
    if any(np.any(np.diff(axis) <= 0) for axis in axes):
        raise MegError("quality table: steps, ratios and psnrs_db must each increase")
    if not np.all(np.isfinite(values) & (values > 0)):
        raise MegError("quality table: every MSE must be positive and finite")
    log_table = jnp.asarray(np.log(values))

    def mse(key: PRNGKeyArray, steps: Array, ratio: Array, psnr_db: Array) -> Array:
        picture = jax.random.randint(key, (), 0, values.shape[0])
        weights = log_table[picture]
        for axis, x in zip(axes, (steps, ratio, psnr_db), strict=True):
            weights = jnp.tensordot(_hat_weights(axis, x), weights, axes=1)
        return jnp.exp(weights)

    return mse


def _hat_weights(axis: np.ndarray, x: Float[Array, ""]) -> Float[Array, " n"]:
    """Return the weights of linear interpolation at x over the axis' points, clamped to its ends."""
    # jnp.interp of each unit vector: n is a handful, and the result is a small dense product instead of
    # gathers.
    return jax.vmap(lambda unit: jnp.interp(x, jnp.asarray(axis, x.dtype), unit))(
        jnp.eye(len(axis), dtype=x.dtype)
    )
