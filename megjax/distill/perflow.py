"""The teacher's windows in piecewise rectified flow, and a student's targets in them, Eqs. (10)-(12)."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from megjax.diffusion import Schedule
from megjax.diffusion.ddim import Denoise
from megjax.diffusion.perflow import (
    WINDOWS,
    Parametrisation,
    signal_power,
    window_gains,
)
from megjax.errors import MegError

GRID = 200
"""Training times lie on a grid of this many: t = 1 - floor(200 u) / 200."""

SolverOrder: TypeAlias = Literal[1, 2]
"""Of the teacher's solver: 1 is DDIM, 2 the second-order Adams-Bashforth rule on it, at no further call."""


class Times(NamedTuple):
    """Where in its trajectory each latent of a batch is judged.

    Args:
        t_B: timesteps, 1000 t.
        start_B: s of their windows.
        end_B: e.
        trajectory_B: which of the trajectories of `solved_windows`.
    """

    t_B: Int[Array, " B"]
    start_B: Int[Array, " B"]
    end_B: Int[Array, " B"]
    trajectory_B: Int[Array, " B"]


class Target(NamedTuple):
    """What the student learns at one time of each latent's trajectory.

    Args:
        z_BxHxWxC: z_t, on the chord of its window.
        t_B: timesteps, 1000 t.
        target_BxHxWxC: what the student should predict there.
    """

    z_BxHxWxC: Float[Array, "B H W C"]
    t_B: Int[Array, " B"]
    target_BxHxWxC: Float[Array, "B H W C"]


class Pairs(NamedTuple):
    """Both ends of windows of the teacher's trajectories.

    Args:
        z_s_BxHxWxC: at the noisy end, Eq. (10).
        z_e_BxHxWxC: where the teacher's solver takes it.
        start_B: s, timesteps.
        end_B: e, timesteps.
    """

    z_s_BxHxWxC: Float[Array, "B H W C"]
    z_e_BxHxWxC: Float[Array, "B H W C"]
    start_B: Int[Array, " B"]
    end_B: Int[Array, " B"]


def trajectory_windows(windows: int = WINDOWS, draws: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The window of each of an example's trajectories, 0 the noisiest: K windows, the k-th draws[k] times.

    Raises:
        MegError: another number of draws than of windows, or one below 1.
    """
    draws = draws or (1,) * windows
    if len(draws) != windows or min(draws) < 1:
        raise MegError(f"window_draws {draws}: one number from 1 up for each of the {windows} windows")
    return tuple(int(k) for k in np.repeat(np.arange(windows), draws))


def draw_times(
    key: Key[Array, ""],
    batch: int,
    sched: Schedule,
    windows: int = WINDOWS,
    draws: tuple[int, ...] = (),
    start_share: float = 0.0,
) -> Times:
    """t = 1 - floor(200 u)/200 with u ~ U[0, 1), and its window (e, s], all as whole timesteps.

    Args:
        key: of the times.
        batch: how many.
        sched: the schedule.
        windows: K.
        draws: see `trajectory_windows`; windows are drawn in these proportions, evenly if it is empty.
        start_share: of the times that are moved to their window's start s.

    Raises:
        MegError: see `trajectory_windows`; a share that is not one.
    """
    if not 0.0 <= start_share <= 1.0:
        raise MegError(f"start_share {start_share}: 0 to 1 is allowed")
    S = len(sched.abar)
    key_u, key_start = jax.random.split(key)
    window_J = jnp.array(trajectory_windows(windows, draws))
    place_B = len(window_J) * jax.random.uniform(key_u, (batch,))
    trajectory_B = place_B.astype(jnp.int32)
    window_B = window_J[trajectory_B]
    start_B, end_B = ((windows - window_B - i) * S // windows for i in (0, 1))
    u_B = (window_B + place_B - trajectory_B) / windows
    # Where the grid does not meet a window's start, its first point lies before it.
    t_B = jnp.minimum(S - jnp.floor(GRID * u_B).astype(jnp.int32) * S // GRID, start_B)
    first_B = jax.random.bernoulli(key_start, start_share, (batch,))
    return Times(jnp.where(first_B, start_B, t_B), start_B, end_B, trajectory_B)


def solve_window(
    teacher: Denoise,
    z_s_BxHxWxC: Float[Array, "B H W C"],
    start_B: Int[Array, " B"],
    end_B: Int[Array, " B"],
    sched: Schedule,
    solver_steps: int = 10,
    solver_order: SolverOrder = 1,
) -> Float[Array, "B H W C"]:
    """The teacher's z_e: from s to e in S even steps of timestep indices, from 1000 s - 1.

    In x = z/sqrt(abar) and sigma = sqrt(1/abar - 1) the flow is dx/dsigma = eps, and DDIM is Euler's rule
    for it. Order 2 takes eps + (eps - eps')/2 h/h' instead, with eps' of the step before and h, h' both steps
    in sigma.

    Args:
        teacher: the frozen noise predictor, guidance included.
        z_s_BxHxWxC: latents at each window's start.
        start_B: s, timesteps.
        end_B: e, timesteps.
        sched: the schedule.
        solver_steps: S.
        solver_order: of its error in the size of a step.
    """
    stride_B = (start_B - end_B) // solver_steps
    sigma = jnp.sqrt(1 / sched.abar - 1)

    def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z, eps_before = carry
        t_B = start_B - 1 - i * stride_B
        # The last step ends at e whatever the stride's rounding, and at abar[0] for e = 0.
        next_B = jnp.where(i + 1 < solver_steps, t_B - stride_B, jnp.maximum(end_B - 1, 0))
        abar, abar_next = (sched.abar[index][:, None, None, None] for index in (t_B, next_B))
        eps = middle = teacher(z, t_B)
        if solver_order == 2:
            h_B, h_before_B = sigma[next_B] - sigma[t_B], sigma[t_B] - sigma[t_B + stride_B]
            # The first step has none before it, and the noisiest window no timestep there.
            share_B = jnp.where(i > 0, h_B / (2 * jnp.where(i > 0, h_before_B, 1.0)), 0.0)
            middle = eps + share_B[:, None, None, None] * (eps - eps_before)
        z0 = (z - jnp.sqrt(1 - abar) * middle) / jnp.sqrt(abar)
        return jnp.sqrt(abar_next) * z0 + jnp.sqrt(1 - abar_next) * middle, eps

    z_e, _ = jax.lax.fori_loop(0, solver_steps, body, (z_s_BxHxWxC, jnp.zeros_like(z_s_BxHxWxC)))
    return z_e


def noisy_start(
    noise_BxHxWxC: Float[Array, "B H W C"],
    z0_BxHxWxC: Float[Array, "B H W C"],
    sched: Schedule,
    start_B: Int[Array, " B"],
    pure_noise: bool = False,
) -> Float[Array, "B H W C"]:
    """Latents noised to each window's start, Eq. (10): sqrt(abar_s) z_0 + sqrt(1 - abar_s) n.

    SDXL's schedule ends at abar = 0.0047, not 0: Eq. (10) leaves of z_0 in the noisiest start what tells a
    picture's mean tone, and the student learns to read it there. A sampler starts from noise alone, whose own
    mean then passes for a tone.

    Args:
        noise_BxHxWxC: n.
        z0_BxHxWxC: normalised latents.
        sched: the schedule.
        start_B: s, timesteps.
        pure_noise: start the noisiest window from n, as a sampler does.
    """
    abar_B = signal_power(sched, start_B)
    if pure_noise:
        abar_B = jnp.where(start_B == len(sched.abar), 0.0, abar_B)
    abar_s = abar_B[:, None, None, None]
    return jnp.sqrt(abar_s) * z0_BxHxWxC + jnp.sqrt(1 - abar_s) * noise_BxHxWxC


def chord_target(
    pairs: Pairs, t_B: Int[Array, " B"], sched: Schedule, kind: Parametrisation = "ddim_eps"
) -> Target:
    """z_t on the chord, z_s + (z_e - z_s)(t - s)/(e - s), and the student's target there, Eq. (12).

    The target is the same along a whole chord: eps* = (z_e - lam_s z_s)/eta_s, or the chord's slope.

    Args:
        pairs: both ends.
        t_B: timesteps inside each pair's window, e excluded.
        sched: the schedule.
        kind: what the student predicts.
    """
    z_s, z_e, start_B, end_B = pairs
    done_B, width_B = ((x - start_B).astype(z_s.dtype) for x in (t_B, end_B))
    share = (done_B / width_B)[:, None, None, None]
    z_t = z_s + (z_e - z_s) * share
    if kind == "velocity":
        duration = (width_B / len(sched.abar))[:, None, None, None]
        return Target(z_t, t_B, (z_e - z_s) / duration)
    lam, eta = (gain[:, None, None, None] for gain in window_gains(sched, start_B, end_B, kind))
    return Target(z_t, t_B, (z_e - lam * z_s) / eta)


def window_target(
    key: Key[Array, ""],
    z0_BxHxWxC: Float[Array, "B H W C"],
    teacher: Denoise,
    sched: Schedule,
    *,
    windows: int = WINDOWS,
    solver_steps: int = 10,
    kind: Parametrisation = "ddim_eps",
    draws: tuple[int, ...] = (),
    start_share: float = 0.0,
    pure_noise: bool = False,
    solver_order: SolverOrder = 1,
) -> Target:
    """Draw times, solve their windows with the teacher and return the student's targets, Eqs. (10), (12).

    Args:
        key: of the times and the noise.
        z0_BxHxWxC: normalised latents.
        teacher: the frozen noise predictor, with its full text and guidance.
        sched: the schedule.
        windows: K.
        solver_steps: S of the teacher's solver inside a window.
        kind: what the student predicts.
        draws: see `draw_times`.
        start_share: likewise.
        pure_noise: see `noisy_start`.
        solver_order: see `solve_window`.
    """
    key_t, key_noise = jax.random.split(key)
    times = draw_times(key_t, len(z0_BxHxWxC), sched, windows, draws, start_share)
    noise = jax.random.normal(key_noise, z0_BxHxWxC.shape, z0_BxHxWxC.dtype)
    start_B, end_B = times.start_B, times.end_B
    z_s = noisy_start(noise, z0_BxHxWxC, sched, start_B, pure_noise)
    z_e = solve_window(teacher, z_s, start_B, end_B, sched, solver_steps, solver_order)
    pairs = Pairs(z_s, jax.lax.stop_gradient(z_e), start_B, end_B)
    return chord_target(pairs, times.t_B, sched, kind)
