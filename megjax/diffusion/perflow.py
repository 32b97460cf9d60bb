"""Piecewise rectified flow (PeRFlow, arXiv 2405.07510): its windows, and the few-step sampler, Eq. (11)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from megjax.diffusion.ddim import Denoise, Schedule
from megjax.errors import MegError, WeightsError

Parametrisation = Literal["ddim_eps", "diff_eps", "velocity"]
"""What the student predicts: the noise of a DDIM step across its window, of the diffusion's, or dz/dt."""

WINDOWS = 4
"""K; one number for training and sampling."""


class Flow(NamedTuple):
    """What a student was distilled to follow; sampled as another flow it gives noise.

    Args:
        kind: what it predicts.
        windows: K, the fewest steps that it serves.
    """

    kind: Parametrisation = "ddim_eps"
    windows: int = WINDOWS


FLOW = "flow.json"
"""Beside a student's weights; one without it is of the paper's flow."""


def flow_file(flow: Flow) -> dict[str, bytes]:
    """The file that tells a student's flow, by its name."""
    return {FLOW: json.dumps(flow._asdict(), indent=2).encode() + b"\n"}


def read_flow(folder: Path) -> Flow:
    """Read a student's flow from its folder; the paper's if nothing there says otherwise.

    Raises:
        WeightsError: a file that does not tell a flow that is known.
    """
    path = folder / FLOW
    if not path.is_file():
        return Flow()
    try:
        flow = Flow(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: not a student's flow ({error})") from None
    if flow.kind not in get_args(Parametrisation) or type(flow.windows) is not int or flow.windows < 1:
        kinds = ", ".join(get_args(Parametrisation))
        raise WeightsError(f"{path}: {flow}; kind can be {kinds}, windows a whole number from 1 up")
    return flow


class Gains(NamedTuple):
    """A window's end as a combination of its start and the student's output: z_e = lam z_s + eta eps."""

    lam: Float[Array, "*b"]
    eta: Float[Array, "*b"]


def window_edges(
    sched: Schedule, t: Int[Array, "*b"], windows: int = WINDOWS
) -> tuple[Int[Array, "*b"], Int[Array, "*b"]]:
    """The window (e, s] that holds a timestep.

    Args:
        sched: the schedule, of S timesteps.
        t: timesteps from 1 to S, where S is pure noise.
        windows: K.

    Returns:
        s and e, whole timesteps.
    """
    S = len(sched.abar)
    number = (t * windows + S - 1) // S
    return number * S // windows, (number - 1) * S // windows


def signal_power(sched: Schedule, t: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """abar at time t / S: abar[t - 1], and abar[0] at t = 0."""
    return sched.abar[jnp.maximum(t - 1, 0)]


def window_gains(
    sched: Schedule, start: Int[Array, "*b"], end: Int[Array, "*b"], kind: Parametrisation = "ddim_eps"
) -> Gains:
    """lam_s and eta_s of Eq. (12): z_e = lam_s z_s + eta_s eps for a student's output at the window's start.

    Args:
        sched: the schedule.
        start: s of each window.
        end: e of each window.
        kind: `ddim_eps` or `diff_eps`; `velocity` has no gains.
    """
    abar_s, abar_e = signal_power(sched, start), signal_power(sched, end)
    lam = jnp.sqrt(abar_e / abar_s)
    if kind == "diff_eps":
        gamma = 1.0 / lam
        return Gains(lam, -jnp.sqrt(1.0 - jnp.square(gamma)) / gamma)
    return Gains(lam, jnp.sqrt(1.0 - abar_e) - lam * jnp.sqrt(1.0 - abar_s))


def velocity(
    sched: Schedule,
    output_BxHxWxC: Float[Array, "B H W C"],
    z_BxHxWxC: Float[Array, "B H W C"],
    t_B: Int[Array, " B"],
    kind: Parametrisation = "ddim_eps",
    windows: int = WINDOWS,
) -> Float[Array, "B H W C"]:
    """dz/dt of the student's flow at a timestep, Eq. (11), in units of time: t = 1 is noise.

    Args:
        sched: the schedule.
        output_BxHxWxC: what the student predicts at (z, t).
        z_BxHxWxC: the flow's state.
        t_B: timesteps from 1 to S.
        kind: what the student predicts.
        windows: K.
    """
    if kind == "velocity":
        return output_BxHxWxC
    S = len(sched.abar)
    start, end = window_edges(sched, t_B, windows)
    lam_s, eta_s = window_gains(sched, start, end, kind)
    s, e, t = (x.astype(z_BxHxWxC.dtype) / S for x in (start, end, t_B))
    D = lam_s * (t - s) + (e - t)
    lam, eta, left = (x[:, None, None, None] for x in (lam_s * (e - s) / D, eta_s * (e - t) / D, e - t))
    return (lam * z_BxHxWxC + eta * output_BxHxWxC - z_BxHxWxC) / left


def perflow_timesteps(
    sched: Schedule, steps: Int[Array, ""] | int, i: Int[Array, "*b"] | int, windows: int = WINDOWS
) -> tuple[Int[Array, "*b"], Int[Array, "*b"]]:
    """The i-th of T >= K timesteps and the one after it.

    The first T mod K (noisiest) windows get T // K + 1 steps, the others T // K; inside a window they are
    evenly spaced from s, e excluded, rounded down. T = 6: 1000 875 750 625 500 250.

    Args:
        sched: the schedule.
        steps: T, traced; fewer than K are taken as K (callers refuse them).
        i: 0 is the noisiest; traced.
        windows: K.
    """
    S = len(sched.abar)
    steps = jnp.maximum(jnp.asarray(steps, jnp.int32), windows)

    def timestep(i: Array) -> Array:
        few, longer = steps // windows, steps % windows
        in_longer = longer * (few + 1)
        count = jnp.where(i < in_longer, few + 1, few)
        window = jnp.where(i < in_longer, i // (few + 1), longer + (i - in_longer) // few)
        place = jnp.where(i < in_longer, i % (few + 1), (i - in_longer) % few)
        start, end = (windows - window) * S // windows, (windows - window - 1) * S // windows
        return (start * count - place * (start - end)) // count

    i = jnp.asarray(i, jnp.int32)
    return timestep(i), jnp.where(i + 1 < steps, timestep(i + 1), 0)


def perflow_step(
    student: Denoise,
    z_BxHxWxC: Float[Array, "B H W C"],
    sched: Schedule,
    t: Int[Array, ""],
    t_next: Int[Array, ""],
    kind: Parametrisation = "ddim_eps",
    windows: int = WINDOWS,
) -> Float[Array, "B H W C"]:
    """One step along the student's flow, Eq. (11): z + (t' - t) v.

    Args:
        student: its prediction at (z_t, 1000 t).
        z_BxHxWxC: the flow's state at t.
        sched: the schedule.
        t: timestep from 1 to S.
        t_next: the one after it.
        kind: what the student predicts.
        windows: K.
    """
    t_B = jnp.full((len(z_BxHxWxC),), t)
    v = velocity(sched, student(z_BxHxWxC, t_B), z_BxHxWxC, t_B, kind, windows)
    return z_BxHxWxC + (t_next - t).astype(z_BxHxWxC.dtype) / len(sched.abar) * v


def perflow(
    student: Denoise,
    z_BxHxWxC: Float[Array, "B H W C"],
    sched: Schedule,
    steps: Int[Array, ""] | int | np.integer,
    start: Int[Array, ""] | int = 0,
    *,
    kind: Parametrisation = "ddim_eps",
    windows: int = WINDOWS,
) -> Float[Array, "B H W C"]:
    """Follow the student's flow from noise to a latent in T steps, Eq. (11): z <- z + (t' - t) v.

    One executable serves every T. One set of weights serves every T, as the flow is straight in each window.

    Args:
        student: its prediction at (z_t, 1000 t).
        z_BxHxWxC: noise, or for image-to-image a picture's latent noised to the `start`-th timestep.
        sched: the schedule.
        steps: T, at least K; traced.
        start: steps to leave out at the noisy end (SDEdit); traced.
        kind: what the student predicts.
        windows: K.

    Raises:
        MegError: for fewer steps than windows, where T is a plain number, or an unknown parametrisation.
    """
    if kind not in get_args(Parametrisation):
        raise MegError(f"parametrisation {kind!r}: choose from {', '.join(get_args(Parametrisation))}")
    if isinstance(steps, (int, np.integer)) and steps < windows:
        raise MegError(f"steps {steps}: a flow of {windows} windows needs at least {windows}")

    dtype = z_BxHxWxC.dtype

    def follow(z: Array, t_B: Array) -> Array:
        return student(z.astype(dtype), t_B).astype(z.dtype)

    def body(i: Array, z: Array) -> Array:
        return perflow_step(follow, z, sched, *perflow_timesteps(sched, T, i, windows), kind, windows)

    T, start = jnp.asarray(steps, jnp.int32), jnp.asarray(start, jnp.int32)
    # Sixteen bits are too few for the times and the sum of many small steps.
    carried = z_BxHxWxC.astype(jnp.promote_types(dtype, jnp.float32))
    return jax.lax.fori_loop(start, jnp.maximum(T, windows), body, carried).astype(dtype)
