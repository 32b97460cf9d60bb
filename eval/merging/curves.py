"""Compare methods at equal bits: interpolated curves and paired bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEAST_MSE = 1e-12
"""What an exact picture counts as, so that it has a logarithm."""


class Curve(NamedTuple):
    """One method's errors: bits as shares of the uncompressed latent, and the MSE of every picture."""

    share_L: Float[np.ndarray, " L"]
    mse_LxP: Float[np.ndarray, "L P"]


class Ratio(NamedTuple):
    """An MSE over the baseline's at equal bits, with a 95 % interval."""

    value: float
    low: float
    high: float


def interpolation(share_L: Float[np.ndarray, " L"], at_S: Float[np.ndarray, " S"]) -> np.ndarray:
    """Return the weights, S x L, of linear interpolation; NaN where a share is out of reach."""
    order = np.argsort(share_L)
    columns = [
        np.interp(at_S, share_L[order], unit[order], left=np.nan, right=np.nan)
        for unit in np.eye(len(share_L))
    ]
    return np.stack(columns, axis=1)


def log_mse_at(
    curve: Curve, at_S: Float[np.ndarray, " S"], weight_WxP: Float[np.ndarray, "W P"]
) -> Float[np.ndarray, "W S"]:
    """Return log mean MSE at given shares of the bits: the mean first, then the logarithm's interpolation.

    Args:
        curve: of one method.
        at_S: shares of the uncompressed latent's bits.
        weight_WxP: weights of the pictures, each row summing to 1.
    """
    log_WxL = np.log(np.maximum(weight_WxP @ curve.mse_LxP.T, LEAST_MSE))
    return log_WxL @ interpolation(curve.share_L, at_S).T


def mse_at(curve: Curve, at_S: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """Return the MSE over all pictures at given shares of the bits; NaN where they are out of reach."""
    pictures = curve.mse_LxP.shape[1]
    return np.exp(log_mse_at(curve, at_S, np.full((1, pictures), 1 / pictures))[0])


def ratio_to(
    baseline: Curve, curve: Curve, at_S: Float[np.ndarray, " S"], *, draws: int = 2000, seed: int = 0
) -> Ratio:
    """Return the geometric mean, over shares that both reach, of MSE over the baseline's at equal bits.

    The interval is the percentiles' of a bootstrap over pictures, the same ones for both.
    """
    pictures = curve.mse_LxP.shape[1]
    resampled = np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), draws)
    weight_WxP = np.concatenate([np.ones((1, pictures)), resampled]) / pictures
    log_WxS = log_mse_at(curve, at_S, weight_WxP) - log_mse_at(baseline, at_S, weight_WxP)
    both_S = np.isfinite(log_WxS[0])
    if not both_S.any():
        return Ratio(np.nan, np.nan, np.nan)
    ratio_W = np.exp(log_WxS[:, both_S].mean(axis=1))
    low, high = np.quantile(ratio_W[1:], [0.025, 0.975])
    return Ratio(float(ratio_W[0]), float(low), float(high))
