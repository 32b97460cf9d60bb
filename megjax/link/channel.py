"""The downlink: path loss, shadowing, block fading, its correlation in time, Shannon's rate, Eq. (4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, PRNGKeyArray, Shaped

from megjax.errors import MegError

Fading: TypeAlias = Literal["none", "rayleigh", "rician"]
"""Small-scale fading: none is |h|^2 = 1 (the authors'), Rayleigh Exp(1), Rician has a line of sight."""

Real: TypeAlias = Shaped[ArrayLike, "..."]
"""A number or an array of numbers, traced or not."""
Leaf: TypeAlias = Any
"""A `Real` in a record. Unchecked, because JAX also rebuilds records with placeholders for leaves."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinkParams:
    """The link's parameters. Every number is a leaf, so it may be traced or vmapped."""

    bandwidth_hz: Leaf = 1e6
    tx_power_dbm: Leaf = 30.0
    noise_power_dbm: Leaf = -94.0
    min_distance_m: Leaf = 200.0
    max_distance_m: Leaf = 300.0
    path_loss_intercept_db: Leaf = 35.3
    """Path loss at 1 m."""
    path_loss_slope_db: Leaf = 37.6
    """Path loss per decade of distance."""
    shadowing_std_db: Leaf = 0.0
    rician_k_db: Leaf = 6.0
    """Power of the line of sight over that of the scattered paths; read when `fading` is rician."""
    snr_gap_db: Leaf = 0.0
    """How far real modulation and coding stay from Shannon's rate."""
    min_snr_db: Leaf = -math.inf
    """Weakest SNR that is sent at: a frame in a deeper fade takes as long as at this one. Without one the
    mean time under Rayleigh or Rician fading is infinite, as E[1 / log2(1 + snr)] is."""
    doppler_hz: Leaf = 0.0
    """Maximum Doppler shift; 0 is a channel that stands still."""
    frame_s: Leaf = 3.0
    """Time between two frames."""
    fading: Fading = field(default="none", metadata={"static": True})

    def __post_init__(self) -> None:
        if self.fading not in get_args(Fading):
            raise MegError(f"fading {self.fading!r}: choose from {', '.join(get_args(Fading))}")


DEFAULT_LINK = LinkParams()

_NEPERS_PER_DB = np.log(10.0).item() / 10.0


def tx_power_w(params: LinkParams = DEFAULT_LINK) -> Float[Array, ""]:
    """Return the transmit power in watts."""
    return from_db(params.tx_power_dbm - 30.0)


def path_loss_db(distance_m: Real, params: LinkParams = DEFAULT_LINK) -> Float[Array, "*b"]:
    """Return the path loss 35.3 + 37.6 log10(d / m) in dB."""
    return params.path_loss_intercept_db + params.path_loss_slope_db * jnp.log10(distance_m)


def snr(
    distance_m: Real,
    fading_power: Real = 1.0,
    shadowing_db: Real = 0.0,
    params: LinkParams = DEFAULT_LINK,
) -> Float[Array, "*shape"]:
    """Return the linear gain-to-noise ratio P h / sigma^2, the channel state of Eqs. (4) and (22).

    Args:
        distance_m: distance ES-UE in metres.
        fading_power: small-scale power gain |h|^2, mean 1.
        shadowing_db: log-normal shadowing in dB, added to the path loss.
        params: the link.
    """
    gain_db = params.tx_power_dbm - params.noise_power_dbm - path_loss_db(distance_m, params) - shadowing_db
    return jnp.asarray(fading_power) * from_db(gain_db)


def rate_bps(snr: Real, params: LinkParams = DEFAULT_LINK) -> Float[Array, "*shape"]:
    """Return the rate B log2(1 + snr / gap) of Eq. (4) in bit/s, `snr` linear, at least `min_snr_db`."""
    served = jnp.maximum(jnp.asarray(snr), from_db(params.min_snr_db))
    # At a weak signal 1 + snr would round to 1, and the rate to 0.
    nats = jnp.log1p(served / from_db(params.snr_gap_db))
    return params.bandwidth_hz * nats / math.log(2.0)


def sample_distance_m(
    key: PRNGKeyArray, params: LinkParams, shape: tuple[int, ...] = ()
) -> Float[Array, "*shape"]:
    """Draw distances in metres, uniform between the link's bounds."""
    u = jax.random.uniform(key, shape)
    return params.min_distance_m + (params.max_distance_m - params.min_distance_m) * u


def sample_shadowing_db(
    key: PRNGKeyArray, params: LinkParams, shape: tuple[int, ...] = ()
) -> Float[Array, "*shape"]:
    """Draw log-normal shadowing in dB: N(0, shadowing_std_db^2)."""
    return params.shadowing_std_db * jax.random.normal(key, shape)


def sample_fading(key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> Complex[Array, "*shape"]:
    """Draw scattered gains g ~ CN(0, 1), the stationary state of `next_fading`."""
    return jax.random.normal(key, shape, jnp.complex64)


def next_fading(key: PRNGKeyArray, fading: Complex[Array, "*b"], params: LinkParams) -> Complex[Array, "*b"]:
    """Step the scattered gains by one frame: Gauss-Markov, g' = rho g + sqrt(1 - rho^2) w, w ~ CN(0, 1).

    The correlation rho = J0(2 pi f_d tau) is Jakes' at one frame; after k frames it is rho^k.
    """
    rho = doppler_correlation(params.doppler_hz, params.frame_s)
    rest = 1.0 - rho**2
    # A channel that stands still has none, and a root no slope there.
    renewed = jnp.where(rest > 0, jnp.sqrt(jnp.where(rest > 0, rest, 1.0)), 0.0)
    return rho * fading + renewed * sample_fading(key, fading.shape)


def fading_power(fading: Complex[Array, "*b"], params: LinkParams) -> Float[Array, "*b"]:
    """Return the power gain |h|^2, mean 1, of scattered gains: 1 for none, |g|^2 for Rayleigh.

    Rician: h = sqrt(K / (K + 1)) + g / sqrt(K + 1).
    """
    if params.fading == "none":
        return jnp.ones_like(fading.real)
    if params.fading == "rayleigh":
        return fading.real**2 + fading.imag**2
    # K / (K + 1) and 1 / (K + 1), whatever K is.
    nepers = params.rician_k_db * _NEPERS_PER_DB
    seen, scattered = (jnp.sqrt(jax.nn.sigmoid(jnp.asarray(sign * nepers))) for sign in (1.0, -1.0))
    return (seen + scattered * fading.real) ** 2 + (scattered * fading.imag) ** 2


def doppler_correlation(doppler_hz: Real, interval_s: Real) -> Float[Array, "*shape"]:
    """Return J0(2 pi f_d tau), the correlation of a scattered gain after `interval_s` (Jakes' spectrum)."""
    phase = jnp.abs(2.0 * jnp.pi * jnp.asarray(doppler_hz, jnp.float32) * interval_s)
    # The midpoint rule on J0's integral over a period converges geometrically while the phase has fewer
    # radians than twice the points; from 80 on two terms of the asymptotic series leave 1e-6.
    angles = np.sin(np.pi * (np.arange(64) + 0.5) / 64).astype(np.float32)
    near = jnp.mean(jnp.cos(phase[..., None] * angles.reshape((1,) * phase.ndim + (64,))), axis=-1)
    x = jnp.maximum(phase, 80.0)  # The branch not taken must stay finite, or its gradient would be NaN.
    far = jnp.sqrt(2.0 / (jnp.pi * x)) * (jnp.cos(x - jnp.pi / 4) + jnp.sin(x - jnp.pi / 4) / (8.0 * x))
    return jnp.where(phase < 80.0, near, far)


def from_db(db: Real) -> Float[Array, "*shape"]:
    """Convert decibels of power to a linear ratio."""
    return jnp.exp(jnp.asarray(db) * _NEPERS_PER_DB)  # Ten times faster than a power of ten on a CPU.


def to_db(ratio: Real) -> Float[Array, "*shape"]:
    """Convert a linear ratio of power to decibels."""
    return 10.0 * jnp.log10(ratio)
