"""The discrete noise schedule and the DDIM solver, in one compiled loop for every number of steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from megjax.errors import MegError, WeightsError
from megjax.models.configs import check_only

Denoise = Callable[[Float[Array, "B H W C"], Int[Array, " B"]], Float[Array, "B H W C"]]
"""Predicts the noise: (z_t, t) -> eps. Parameters, text and guidance are bound in it."""

Spacing = Literal["leading", "trailing", "linspace"]
"""Where the timesteps lie: `leading` ends at the offset, `trailing` starts at the last, pure-noise step, and
`linspace` does both, at 0 and at the last."""

ONLY = {
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    # Else the last step would end at abar = 1, not at abar[0].
    "set_alpha_to_one": False,
    # EDM's, which scales what the U-Net sees.
    "sigma_data": None,
    "thresholding": False,
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_flow_sigmas": False,
}
"""The values of diffusers' fields that `Schedule` and `ddim` have, whichever scheduler's config it is.

How another solver spaces its steps (`use_karras_sigmas`) says nothing of the model, and is not read.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """SDXL's scaled-linear schedule, the abar of Eq. (10).

    Args:
        abar: cumulative product of 1 - beta, (1000,); abar[t] is the signal's share of power at timestep t.
        spacing: of the DDIM timesteps.
        offset: added to `leading` timesteps.
    """

    abar: Float[Array, " S"]
    spacing: Spacing = dataclasses.field(default="leading", metadata={"static": True})
    offset: int = dataclasses.field(default=1, metadata={"static": True})


def schedule(
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
    spacing: Spacing | str = "leading",
    offset: int = 1,
) -> Schedule:
    """Scaled-linear betas: their square roots are evenly spaced.

    Raises:
        MegError: for betas outside 0 < start <= end < 1, an offset outside the timesteps, an unknown spacing.
    """
    if not 0 <= offset < num_train_timesteps:
        raise MegError(
            f"offset {offset}, num_train_timesteps {num_train_timesteps}: need 0 <= offset < timesteps"
        )
    if not 0 < beta_start <= beta_end < 1:
        raise MegError(f"betas {beta_start}..{beta_end}: need 0 < beta_start <= beta_end < 1")
    if spacing not in get_args(Spacing):
        raise MegError(f"timestep spacing {spacing!r}: choose from {', '.join(get_args(Spacing))}")
    # float64 on the host: a cumulative product of a thousand factors.
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    return Schedule(jnp.asarray(np.cumprod(1 - betas), jnp.float32), cast(Spacing, spacing), offset)


def read_schedule(path: str | Path) -> Schedule:
    """Read diffusers' `scheduler_config.json`; the solver is DDIM, whichever scheduler's it is.

    Args:
        path: of the file.

    Raises:
        WeightsError: for a file that is missing or broken, or a value that `ONLY` has not.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable scheduler config ({error})") from None
    if not isinstance(raw, dict):
        raise WeightsError(f"{path}: not a readable scheduler config (no JSON object)")
    check_only(raw, ONLY, str(path))
    start, end, offset = raw.get("beta_start"), raw.get("beta_end"), raw.get("steps_offset", 0)
    # No default for the betas: diffusers' are not SDXL's, and other kinds of schedule have none.
    if not (isinstance(start, int | float) and isinstance(end, int | float) and isinstance(offset, int)):
        raise WeightsError(
            f"{path}: beta_start {start!r}, beta_end {end!r}, steps_offset {offset!r}; two numbers and an "
            "integer are needed"
        )
    try:
        return schedule(
            float(start), float(end), spacing=str(raw.get("timestep_spacing", "leading")), offset=offset
        )
    except MegError as error:
        raise WeightsError(f"{path}: {error}") from None


def _rounded(numerator: Int[Array, ...], divisor: Int[Array, ...]) -> Int[Array, ...]:
    """The quotient in integers, half to even as numpy rounds."""
    quotient, rest = numerator // divisor, numerator % divisor
    up = (2 * rest > divisor) | ((2 * rest == divisor) & (quotient % 2 == 1))
    return quotient + up.astype(jnp.int32)


def ddim_timesteps(
    sched: Schedule, steps: Int[Array, ""] | int, i: Int[Array, ...] | int
) -> tuple[Int[Array, ...], Int[Array, ...]]:
    """The i-th of `steps` timesteps and the one after it, as in diffusers' `DDIMScheduler`.

    Args:
        sched: the schedule.
        steps: number of steps, at least 1; traced.
        i: 0 is the noisiest; traced.

    Returns:
        t and t_next; a negative t_next stands for the end, where abar is abar[0].
    """
    S = sched.abar.shape[0]
    steps, i = jnp.asarray(steps, jnp.int32), jnp.asarray(i, jnp.int32)
    stride = S // steps
    if sched.spacing == "leading":
        t = (steps - 1 - i) * stride + sched.offset
    elif sched.spacing == "trailing":
        t = _rounded(S * (steps - i), steps) - 1
    else:
        t = _rounded((S - 1) * (steps - 1 - i), jnp.maximum(steps - 1, 1))
    t = jnp.clip(t, 0, S - 1)
    return t, t - stride


def noised(
    sched: Schedule,
    z0_BxHxWxC: Float[Array, "B H W C"],
    noise_BxHxWxC: Float[Array, "B H W C"],
    t_B: Int[Array, " B"],
) -> Float[Array, "B H W C"]:
    """Eq. (10): sqrt(abar_t) z_0 + sqrt(1 - abar_t) n."""
    abar = sched.abar[t_B][:, None, None, None]
    return jnp.sqrt(abar) * z0_BxHxWxC + jnp.sqrt(1 - abar) * noise_BxHxWxC


def ddim(
    denoise: Denoise,
    z_BxHxWxC: Float[Array, "B H W C"],
    sched: Schedule,
    steps: Int[Array, ""] | int,
    start: Int[Array, ""] | int = 0,
) -> Float[Array, "B H W C"]:
    """Solve the probability-flow ODE by deterministic DDIM (Song et al. 2021, eta = 0).

    One executable serves every number of steps, since the loop's bounds are traced.

    Args:
        denoise: the noise predictor.
        z_BxHxWxC: noise, or for image-to-image a picture's latent noised to the `start`-th timestep.
        sched: the schedule.
        steps: number of steps of the whole trajectory; traced.
        start: steps to leave out at the noisy end (SDEdit); traced.

    Returns:
        The denoised latents.
    """
    B, dtype = z_BxHxWxC.shape[0], z_BxHxWxC.dtype
    steps, start = jnp.asarray(steps, jnp.int32), jnp.asarray(start, jnp.int32)

    def body(i: Array, z: Array) -> Array:
        t, t_next = ddim_timesteps(sched, steps, i)
        abar, abar_next = sched.abar[t], sched.abar[jnp.maximum(t_next, 0)]
        eps = denoise(z.astype(dtype), jnp.full((B,), t)).astype(z.dtype)
        z0 = (z - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)
        return (jnp.sqrt(abar_next) * z0 + jnp.sqrt(1 - abar_next) * eps).astype(z.dtype)

    # Sixteen bits are too few for the sum of many small steps.
    carried = z_BxHxWxC.astype(jnp.promote_types(dtype, jnp.float32))
    return jax.lax.fori_loop(start, steps, body, carried).astype(dtype)
