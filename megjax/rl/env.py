"""The constrained MDP of Eqs. (22)-(23) under gymnax 1.0's functional contract: pure `reset` and `step`.

One environment, one frame a step. `jax.vmap` over keys (and over `EnvParams`, whose every number may be
traced) makes many. An episode of 64 frames only ever ends by truncation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int, PRNGKeyArray, Shaped

from megjax.link import channel
from megjax.link.channel import LinkParams
from megjax.link.cost import Compute, FrameCost, frame_cost
from megjax.link.features import psnr_from_snr
from megjax.rl.quality import QualitySource, analytic_mse

Real: TypeAlias = float | int | Shaped[Array, "..."]
Payload: TypeAlias = Callable[[Float[Array, ""]], Shaped[Array, ""]]
"""ratio -> bits of the message, side information included."""

ANALYTIC_COMPUTE = Compute(
    es_fixed_s=0.826, es_step_s=0.3007, ue_s=0.0, es_fixed_j=0.0, es_step_j=130.0, ue_j=0.0, fixed_j=250.0
)
"""The reference problem `analytic`: 0.3007 T + 0.826 s and 0.13 T + 0.25 kJ."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EnvParams:
    """What may differ between two runs of one compiled program; every number may be traced."""

    limits: Shaped[Array, "*g 2"] | tuple[Real, Real] = (3.0, 1.8)
    """Mean latency (s) and mean energy (kJ) allowed per frame, Eq. (9)."""
    compute: Compute = ANALYTIC_COMPUTE
    link: LinkParams = field(default_factory=LinkParams)
    psnr_db: Real = 10.0
    """PSNR of the received features, which the quality source reads; tied to the link, the margin over it."""
    min_steps: Real = 4
    max_steps: Real = 12
    max_steps_in_episode: Real = 64


REFERENCE = EnvParams()
"""The reference problem `analytic` under 3 s and 1.8 kJ a frame."""


class EnvState(NamedTuple):
    """The state of one environment."""

    time: Int[Array, ""]
    snr: Float[Array, ""]
    """P h_n / sigma^2, linear."""
    fading: Complex[Array, ""]
    """The scattered gain behind `snr`; unused without small-scale fading."""
    costs: Float[Array, " 2"]
    """L_{n-1} (s) and E_{n-1} (kJ); 0 in the first frame."""


class Env(NamedTuple):
    """An environment as two pure functions and its sizes: what the learners need to know of it."""

    reset: Callable[[PRNGKeyArray, Any], tuple[Array, Any]]
    """(key, params) -> (observation, state)."""
    step: Callable[..., tuple[Array, Any, Array, Array, Array, dict[str, Array]]]
    """(key, state, action, params) -> (observation, state, reward, terminated, truncated, info).

    Resets by itself when an episode ends; `info` holds `cost` [m] and `final_observation`, the successor
    state before any reset, which is what a value function has to bootstrap from.
    """
    observation_size: int
    action_size: int
    cost_size: int


def denoising_steps(action: Float[Array, "*b"], params: EnvParams) -> Float[Array, "*b"]:
    """Return T_n = T_min + floor((T_max - T_min + 1) a_0), capped at T_max."""
    steps = params.min_steps + jnp.floor((params.max_steps - params.min_steps + 1) * action)
    return jnp.minimum(steps, params.max_steps)


def action_of(steps: Real, ratio: Real, params: EnvParams = REFERENCE) -> Float[Array, " 2"]:
    """Return the action in the middle of those that mean T steps and ratio r."""
    levels = params.max_steps - params.min_steps + 1
    return jnp.stack([(jnp.asarray(steps) - params.min_steps + 0.5) / levels, jnp.asarray(ratio, float)])


def analytic_payload(ratio: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return the reference problem's bits: 65536 16-bit values, one symbol for each 16-value token merged."""
    return 65536 * 16 * ((1.0 - ratio) + ratio / 16)


def step_cost(
    steps: Float[Array, ""],
    ratio: Float[Array, ""],
    snr: Float[Array, ""],
    params: EnvParams,
    payload: Payload,
) -> FrameCost:
    """Return every part of one frame's latency and energy, Eqs. (1)-(7), at channel state `snr` (linear)."""
    power_w = channel.tx_power_w(params.link)
    return frame_cost(params.compute, steps, payload(ratio), channel.rate_bps(snr, params.link), power_w)


def feature_psnr_db(snr: Float[Array, ""], params: EnvParams, tied: bool) -> Float[Array, ""]:
    """Return the PSNR that the quality source reads: the problem's, or the link's SNR and a margin."""
    return psnr_from_snr(snr, params.link, params.psnr_db) if tied else jnp.asarray(params.psnr_db, snr.dtype)


def make_env(
    quality: QualitySource = analytic_mse,
    payload: Payload = analytic_payload,
    *,
    observe_limits: bool = False,
    tied_psnr: bool = False,
) -> Env:
    """Return the environment of Eqs. (22)-(23).

    Args:
        quality: the MSE behind the reward -log MSE.
        payload: bits of a message at a merging ratio.
        observe_limits: append the limits to the observation, for one policy that obeys any limits.
        tied_psnr: the features' PSNR follows the link's SNR (`features.psnr_from_snr`), `psnr_db` above it.
    """

    def observation(state: EnvState, params: EnvParams) -> Float[Array, " o"]:
        parts = [channel.to_db(state.snr)[None], state.costs]
        if observe_limits:
            parts.append(jnp.asarray(params.limits, state.costs.dtype))
        return jnp.concatenate(parts)

    def draw_snr(key: PRNGKeyArray, fading: Complex[Array, ""], params: EnvParams) -> Float[Array, ""]:
        distance_m = channel.sample_distance_m(key, params.link)
        # Most links have none, and the draw is a fifth of a step's time.
        shadowing_db = jax.lax.cond(
            params.link.shadowing_std_db != 0.0,
            lambda: channel.sample_shadowing_db(jax.random.fold_in(key, 1), params.link),
            lambda: jnp.zeros(()),
        )
        return channel.snr(distance_m, channel.fading_power(fading, params.link), shadowing_db, params.link)

    def reset(key: PRNGKeyArray, params: EnvParams) -> tuple[Float[Array, " o"], EnvState]:
        still = jnp.zeros((), jnp.complex64)
        fading = still if params.link.fading == "none" else channel.sample_fading(jax.random.fold_in(key, 2))
        zero = jnp.zeros(2)
        state = EnvState(
            jnp.zeros((), jnp.int32), draw_snr(key, fading, params).astype(zero.dtype), fading, zero
        )
        return observation(state, params), state

    def step(
        key: PRNGKeyArray, state: EnvState, action: Float[Array, " 2"], params: EnvParams
    ) -> tuple[
        Float[Array, " o"], EnvState, Float[Array, ""], Bool[Array, ""], Bool[Array, ""], dict[str, Any]
    ]:
        action = jnp.clip(action, 0.0, 1.0)
        steps = denoising_steps(action[0], params)
        ratio = action[1]
        cost = step_cost(steps, ratio, state.snr, params, payload)
        psnr_db = feature_psnr_db(state.snr, params, tied_psnr).astype(steps.dtype)
        mse = quality(jax.random.fold_in(key, 4), steps, ratio, psnr_db)
        costs = jnp.stack([cost.latency_s, cost.energy_j / 1000.0])

        reset_observation, reset_state = reset(key, params)
        # Only one of the two draws of the channel is used, so they may share the key; without fading they are
        # one draw.
        fading, snr = reset_state.fading, reset_state.snr
        if params.link.fading != "none":
            fading = channel.next_fading(jax.random.fold_in(key, 3), state.fading, params.link)
            snr = draw_snr(key, fading, params).astype(snr.dtype)
        next_state = EnvState(state.time + 1, snr, fading, costs)
        next_observation = observation(next_state, params)
        truncated = next_state.time >= params.max_steps_in_episode
        info = {
            "cost": costs,
            "final_observation": next_observation,
            "steps": steps,
            "ratio": ratio,
            "mse": mse,
            "terminated": jnp.zeros((), bool),
            "truncated": truncated,
        }
        state, obs = jax.tree.map(
            lambda ended, going: jnp.where(truncated, ended, going),
            (reset_state, reset_observation),
            (next_state, next_observation),
        )
        return obs, state, -jnp.log(mse), info["terminated"], truncated, info

    return Env(reset, step, 5 if observe_limits else 3, 2, 2)
