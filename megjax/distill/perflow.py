"""Distilling a U-Net by piecewise rectified flow: window targets and loss, Eqs. (10)-(12)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from megjax.diffusion import Conditioning, Schedule, conditioned, guided
from megjax.diffusion.ddim import Denoise
from megjax.diffusion.guidance import UNetCall
from megjax.diffusion.perflow import (
    WINDOWS,
    Parametrisation,
    signal_power,
    velocity,
    window_edges,
    window_gains,
)
from megjax.errors import MegError
from megjax.models import Params
from megjax.training.step import Loss, Metrics

GRID = 200
"""Training times lie on a grid of this many: t = 1 - floor(200 u) / 200."""

Measure: TypeAlias = Literal["output", "velocity"]
"""What errors are measured of: the student's output, Eq. (12), or the velocity it stands for, Eq. (11)."""

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

    t_B: Int[Array, B]
    start_B: Int[Array, B]
    end_B: Int[Array, B]
    trajectory_B: Int[Array, B]


class Target(NamedTuple):
    """What the student learns at one time of each latent's trajectory.

    Args:
        z_BxHxWxC: z_t, on the chord of its window.
        t_B: timesteps, 1000 t.
        target_BxHxWxC: what the student should predict there.
    """

    z_BxHxWxC: Float[Array, "B H W C"]
    t_B: Int[Array, B]
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
    start_B: Int[Array, B]
    end_B: Int[Array, B]


class Batch(NamedTuple):
    """What a step of `perflow_loss` reads.

    Args:
        teacher: the frozen U-Net's parameters.
        z0_BxHxWxC: normalised latents.
        prompt: their captions' conditioning.
        empty: the empty prompt's.
    """

    teacher: Params
    z0_BxHxWxC: Float[Array, "B H W C"]
    prompt: Conditioning
    empty: Conditioning


class Solved(NamedTuple):
    """What a step of `solved_loss` reads: trajectories through windows of each example, the noisiest first.

    Args:
        z_s_BxJxHxWxC: their noisy ends.
        z_e_BxJxHxWxC: where the teacher's solver took them.
        prompt: the captions' conditioning.
        empty: the empty prompt's.
    """

    z_s_BxJxHxWxC: Float[Array, "B J H W C"]
    z_e_BxJxHxWxC: Float[Array, "B J H W C"]
    prompt: Conditioning
    empty: Conditioning


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
    start_B: Int[Array, B],
    end_B: Int[Array, B],
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


def draw_pairs(
    noise_BxHxWxC: Float[Array, "B H W C"],
    z0_BxHxWxC: Float[Array, "B H W C"],
    teacher: Denoise,
    sched: Schedule,
    start_B: Int[Array, B],
    end_B: Int[Array, B],
    solver_steps: int = 10,
    pure_noise: bool = False,
    solver_order: SolverOrder = 1,
) -> Pairs:
    """Noise latents to each window's start, Eq. (10), and let the teacher solve to its end.

    SDXL's schedule ends at abar = 0.0047, not 0: Eq. (10) leaves of z_0 in the noisiest start what tells a
    picture's mean tone, and the student learns to read it there. A sampler starts from noise alone, whose own
    mean then passes for a tone.

    Args:
        noise_BxHxWxC: n.
        z0_BxHxWxC: normalised latents.
        teacher: the frozen noise predictor, guidance included.
        sched: the schedule.
        start_B: s, timesteps.
        end_B: e, timesteps.
        solver_steps: S.
        pure_noise: start the noisiest window from n, as a sampler does.
        solver_order: see `solve_window`.
    """
    abar_B = signal_power(sched, start_B)
    if pure_noise:
        abar_B = jnp.where(start_B == len(sched.abar), 0.0, abar_B)
    abar_s = abar_B[:, None, None, None]
    z_s = jnp.sqrt(abar_s) * z0_BxHxWxC + jnp.sqrt(1 - abar_s) * noise_BxHxWxC
    z_e = solve_window(teacher, z_s, start_B, end_B, sched, solver_steps, solver_order)
    return Pairs(z_s, z_e, start_B, end_B)


def chord_target(
    pairs: Pairs, t_B: Int[Array, B], sched: Schedule, kind: Parametrisation = "ddim_eps"
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
        pure_noise: see `draw_pairs`.
        solver_order: see `solve_window`.
    """
    key_t, key_noise = jax.random.split(key)
    times = draw_times(key_t, len(z0_BxHxWxC), sched, windows, draws, start_share)
    noise = jax.random.normal(key_noise, z0_BxHxWxC.shape)
    pairs = draw_pairs(
        noise,
        z0_BxHxWxC,
        teacher,
        sched,
        times.start_B,
        times.end_B,
        solver_steps=solver_steps,
        pure_noise=pure_noise,
        solver_order=solver_order,
    )
    return chord_target(jax.lax.stop_gradient(pairs), times.t_B, sched, kind)


def regression(
    prediction_BxHxWxC: Float[Array, "B H W C"],
    target_BxHxWxC: Float[Array, "B H W C"],
    huber: float | None = None,
) -> Float[Array, B]:
    """Each latent's mean squared error in float32, or its mean Huber loss of width `huber`."""
    error = prediction_BxHxWxC.astype(jnp.float32) - target_BxHxWxC.astype(jnp.float32)
    loss = jnp.square(error) if huber is None else 2.0 * optax.losses.huber_loss(error, delta=huber)
    return jnp.mean(loss, axis=(1, 2, 3))


def student_errors(
    output_BxHxWxC: Float[Array, "B H W C"],
    target: Target,
    sched: Schedule,
    *,
    kind: Parametrisation = "ddim_eps",
    windows: int = WINDOWS,
    huber: float | None = None,
    measure: Measure = "output",
) -> Float[Array, B]:
    """Each latent's distance from its target.

    Measured in the output, an error weighs alike in all windows, though one in the noisiest moves the latent
    most: eta_s of Eq. (12) is -2.5, -1.3, -0.8 and -0.7 in SDXL's schedule. The velocity's error, by which
    rectified flow is defined, weighs each by what it does to the latent.

    Args:
        output_BxHxWxC: what the student predicts.
        target: what it should.
        sched: the schedule.
        kind: what the student predicts.
        windows: K.
        huber: see `regression`.
        measure: `output` or `velocity`.
    """
    wanted = target.target_BxHxWxC
    if measure == "velocity":
        output_BxHxWxC, wanted = (
            velocity(sched, x, target.z_BxHxWxC, target.t_B, kind, windows) for x in (output_BxHxWxC, wanted)
        )
    return regression(output_BxHxWxC, wanted, huber)


def drop_text(key: Key[Array, ""], prompt: Conditioning, empty: Conditioning, rate: float) -> Conditioning:
    """Replace captions by the empty prompt with probability `rate`."""
    dropped_B = jax.random.bernoulli(key, rate, (len(prompt.pooled_BxP),))

    def choose(full: Array, none: Array) -> Array:
        return jnp.where(dropped_B.reshape(-1, *(1,) * (full.ndim - 1)), none, full)

    return jax.tree.map(choose, prompt, empty)


def perflow_loss(
    unet: UNetCall,
    sched: Schedule,
    *,
    guidance: float = 7.5,
    windows: int = WINDOWS,
    solver_steps: int = 10,
    kind: Parametrisation = "ddim_eps",
    text_drop: float = 0.1,
    huber: float | None = None,
    measure: Measure = "output",
    draws: tuple[int, ...] = (),
    start_share: float = 0.0,
    pure_noise: bool = False,
    solver_order: SolverOrder = 1,
    teacher_unet: UNetCall | None = None,
) -> Loss:
    """Eq. (12): the student at z_t against the teacher's chord; the teacher always has the full text and CFG.

    Args:
        unet: the student's graph, and the teacher's.
        sched: the schedule.
        guidance: of the teacher's solver.
        windows: K.
        solver_steps: S.
        kind: what the student predicts.
        text_drop: probability of the empty prompt.
        huber: width of the Huber loss; None is the squared error.
        measure: see `student_errors`.
        draws: see `draw_times`.
        start_share: likewise.
        pure_noise: see `draw_pairs`.
        solver_order: see `solve_window`.
        teacher_unet: the teacher's graph where its options differ (no rematerialisation, say).

    Returns:
        A loss over `Batch`, with `window_k` (k = 0 is the noisiest) among its metrics: each window's own
        mean, the teacher-consistency error; 0 where a batch has none of its times.
    """

    errors = partial(student_errors, sched=sched, kind=kind, windows=windows, huber=huber, measure=measure)

    def loss(params: Any, key: Key[Array, ""], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        key_target, key_drop = jax.random.split(key)
        teacher = guided(teacher_unet or unet, batch.teacher, batch.prompt, batch.empty, guidance)
        target = window_target(
            key_target,
            batch.z0_BxHxWxC.astype(jnp.float32),
            teacher,
            sched,
            windows=windows,
            solver_steps=solver_steps,
            kind=kind,
            draws=draws,
            start_share=start_share,
            pure_noise=pure_noise,
            solver_order=solver_order,
        )
        prompt = drop_text(key_drop, batch.prompt, batch.empty, text_drop)
        output = conditioned(unet, params, prompt)(target.z_BxHxWxC, target.t_B)
        error_B = errors(output, target)
        return jnp.mean(error_B), window_metrics(error_B, target.t_B, sched, windows)

    return loss


def solved_loss(
    unet: UNetCall,
    sched: Schedule,
    *,
    windows: int = WINDOWS,
    kind: Parametrisation = "ddim_eps",
    text_drop: float = 0.1,
    huber: float | None = None,
    measure: Measure = "output",
    draws: tuple[int, ...] = (),
    start_share: float = 0.0,
) -> Loss:
    """Eq. (12) on windows that the teacher has solved before: a step costs one call of the student.

    A chord serves all its times, which is what makes keeping its ends worth while on a small machine.

    Args:
        unet: the student's graph.
        sched: the schedule.
        windows: K.
        kind: what the student predicts.
        text_drop: probability of the empty prompt.
        huber: width of the Huber loss; None is the squared error.
        measure: see `student_errors`.
        draws: as in `solved_windows`.
        start_share: see `draw_times`.

    Returns:
        A loss over `Solved`, with the metrics of `perflow_loss`.
    """

    errors = partial(student_errors, sched=sched, kind=kind, windows=windows, huber=huber, measure=measure)

    def loss(params: Any, key: Key[Array, ""], batch: Solved) -> tuple[Float[Array, ""], Metrics]:
        key_t, key_drop = jax.random.split(key)
        B = len(batch.z_s_BxJxHxWxC)
        t_B, start_B, end_B, trajectory_B = draw_times(key_t, B, sched, windows, draws, start_share)
        z_s, z_e = (
            jnp.take_along_axis(z, trajectory_B[:, None, None, None, None], axis=1)[:, 0].astype(jnp.float32)
            for z in (batch.z_s_BxJxHxWxC, batch.z_e_BxJxHxWxC)
        )
        target = chord_target(Pairs(z_s, z_e, start_B, end_B), t_B, sched, kind)
        prompt = drop_text(key_drop, batch.prompt, batch.empty, text_drop)
        output = conditioned(unet, params, prompt)(target.z_BxHxWxC, t_B)
        error_B = errors(output, target)
        return jnp.mean(error_B), window_metrics(error_B, t_B, sched, windows)

    return loss


def window_metrics(
    error_B: Float[Array, B], t_B: Int[Array, B], sched: Schedule, windows: int = WINDOWS
) -> Metrics:
    """Mean error of each window, the noisiest first."""
    start_B, _ = window_edges(sched, t_B, windows)
    number_B = windows - start_B * windows // len(sched.abar)
    metrics = {}
    for k in range(windows):
        mine_B = number_B == k
        metrics[f"window_{k}"] = jnp.sum(jnp.where(mine_B, error_B, 0.0)) / jnp.maximum(mine_B.sum(), 1)
    return metrics
