"""The losses of a few-step student: Eq. (12) in its windows, and the error of its whole way."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from megjax.diffusion import Conditioning, Schedule, conditioned, guided
from megjax.diffusion.ddim import Denoise
from megjax.diffusion.guidance import UNetCall
from megjax.diffusion.perflow import (
    WINDOWS,
    Parametrisation,
    perflow_step,
    perflow_timesteps,
    velocity,
)
from megjax.distill.perflow import (
    Pairs,
    SolverOrder,
    Target,
    chord_target,
    draw_times,
    trajectory_windows,
    window_target,
)
from megjax.models import Params
from megjax.training.step import Loss, Metrics, Share

Measure: TypeAlias = Literal["output", "velocity"]
"""What errors are measured of: the student's output, Eq. (12), or the velocity it stands for, Eq. (11)."""


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


def regression(
    prediction_BxHxWxC: Float[Array, "B H W C"],
    target_BxHxWxC: Float[Array, "B H W C"],
    huber: float | None = None,
) -> Float[Array, " B"]:
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
) -> Float[Array, " B"]:
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


def rollout_errors(
    student: Denoise,
    noise_BxHxWxC: Float[Array, "B H W C"],
    z0_BxHxWxC: Float[Array, "B H W C"],
    sched: Schedule,
    *,
    kind: Parametrisation = "ddim_eps",
    windows: int = WINDOWS,
) -> Float[Array, " B"]:
    """Each latent's mean squared distance from its teacher's at the end of the student's K steps.

    A window's error is not all alike to the picture: what decides the layout grows in every window after it,
    while the rest dies out. Through this loss each call learns from what becomes of its error.

    Args:
        student: its prediction at (z_t, 1000 t).
        noise_BxHxWxC: where its way begins.
        z0_BxHxWxC: where the teacher's trajectory from there ends.
        sched: the schedule.
        kind: what the student predicts.
        windows: K.
    """
    z = noise_BxHxWxC
    # Written out: gradients of convolutions inside a loop take ten times as long on a CPU.
    for i in range(windows):
        z = perflow_step(student, z, sched, *perflow_timesteps(sched, windows, i, windows), kind, windows)
    return regression(z, z0_BxHxWxC)


def pseudo_huber(error_B: Float[Array, " B"], width: float) -> Float[Array, " B"]:
    """2 w^2 (sqrt(1 + e/w^2) - 1) of mean squared errors e: e where it is small, 2 w sqrt(e) where large."""
    return 2 * width**2 * (jnp.sqrt(1 + error_B / width**2) - 1)


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
        pure_noise: see `noisy_start`.
        solver_order: see `solve_window`.
        teacher_unet: the teacher's graph where its options differ (no rematerialisation, say).

    Returns:
        A loss over `Batch`, with `window_k` (k = 0 is the noisiest) among its metrics: each window's own
        mean, the teacher-consistency error.
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
    rollout: float = 0.0,
    rollout_width: float | None = None,
) -> Loss:
    """Eq. (12) on windows that the teacher has solved before: a step costs one call of the student.

    A chord serves all its times, which is what makes keeping its ends worth while on a small machine. With a
    `rollout` a step costs K calls more, and the windows have to be `chained`.

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
        rollout: weight of `rollout_errors` beside Eq. (12)'s.
        rollout_width: of their `pseudo_huber`, or None. Near some noises the teacher's picture tips from one
            layout to another; squared, these few make most of the mean and drown what can be learned.

    Returns:
        A loss over `Solved`, with the metrics of `perflow_loss`, and `rollout` if it has a weight.
    """
    window_J = trajectory_windows(windows, draws)
    whole = min(draws, default=1)
    last = window_J.index(windows - 1)

    def pick(z_BxJxHxWxC: Array, j_B: Array) -> Array:
        z_Bx1xHxWxC = jnp.take_along_axis(z_BxJxHxWxC, j_B[:, None, None, None, None], axis=1)
        return z_Bx1xHxWxC[:, 0].astype(jnp.float32)

    errors = partial(student_errors, sched=sched, kind=kind, windows=windows, huber=huber, measure=measure)

    def loss(params: Any, key: Key[Array, ""], batch: Solved) -> tuple[Float[Array, ""], Metrics]:
        key_t, key_drop, key_way = jax.random.split(key, 3)
        B = len(batch.z_s_BxJxHxWxC)
        t_B, start_B, end_B, trajectory_B = draw_times(key_t, B, sched, windows, draws, start_share)
        z_s, z_e = (pick(z, trajectory_B) for z in (batch.z_s_BxJxHxWxC, batch.z_e_BxJxHxWxC))
        target = chord_target(Pairs(z_s, z_e, start_B, end_B), t_B, sched, kind)
        prompt = drop_text(key_drop, batch.prompt, batch.empty, text_drop)
        output = conditioned(unet, params, prompt)(target.z_BxHxWxC, t_B)
        error_B = errors(output, target)
        value, metrics = jnp.mean(error_B), window_metrics(error_B, t_B, sched, windows)
        if not rollout:
            return value, metrics
        way_of_B = jax.random.randint(key_way, (B,), 0, whole)
        noise, z0 = pick(batch.z_s_BxJxHxWxC, way_of_B), pick(batch.z_e_BxJxHxWxC, last + way_of_B)
        student = conditioned(unet, params, batch.prompt)
        way_B = rollout_errors(student, noise, z0, sched, kind=kind, windows=windows)
        metrics["rollout"] = jnp.mean(way_B)
        if rollout_width is not None:
            way_B = pseudo_huber(way_B, rollout_width)
        return value + rollout * jnp.mean(way_B), metrics

    return loss


def window_metrics(
    error_B: Float[Array, " B"], t_B: Int[Array, " B"], sched: Schedule, windows: int = WINDOWS
) -> Metrics:
    """Mean error of each window, the noisiest first."""
    S = len(sched.abar)
    number_B = windows - (t_B * windows + S - 1) // S  # as `window_edges` counts them, from the other end
    metrics: Metrics = {}
    for k in range(windows):
        mine_B = number_B == k
        total = jnp.sum(jnp.where(mine_B, error_B, 0.0))
        metrics[f"window_{k}"] = Share(total, jnp.sum(mine_B, dtype=jnp.float32))
    return metrics
