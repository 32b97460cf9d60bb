"""The optimum of problem (23) where no action moves the channel: a linear programme over (bin, action).

The master programme holds a few actions a bin; its shadow prices say which action every bin would rather
have, which are added until none is missing (column generation). That is exact on the whole grid and a
thousand times faster than writing all of it down.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.sparse

from megjax.errors import MegError
from megjax.link import channel
from megjax.rl.env import REFERENCE, EnvParams, Payload, analytic_payload, feature_psnr_db, step_cost
from megjax.rl.quality import QualitySource, analytic_mse


class Tables(NamedTuple):
    """Rewards and costs of every action in every channel bin."""

    rewards_SxA: np.ndarray
    costs_SxAxM: np.ndarray
    snr_S: np.ndarray
    """Linear gain-to-noise ratio of each bin; the bins are equally likely."""
    actions_Ax2: np.ndarray
    """(steps, ratio) of each action."""


class Optimum(NamedTuple):
    """The best mean reward under the limits, the policy that has it and what the limits cost."""

    reward: float
    costs: np.ndarray
    """Mean cost of the optimal policy [m]."""
    prices: np.ndarray
    """Shadow prices [m]: reward gained per unit of each limit."""
    policy_SxA: np.ndarray
    """Probability of each action in each bin."""


class Reach(NamedTuple):
    """What limits can be met at all."""

    feasible: bool
    lowest: np.ndarray
    """Lowest reachable mean of each cost, one at a time [m]."""
    excess: float
    """Smallest factor, less one, by which all limits together would have to grow; 0 if they can be met."""


def tables(
    params: EnvParams = REFERENCE,
    quality: QualitySource = analytic_mse,
    payload: Payload = analytic_payload,
    bins: int = 200,
    ratios: int = 401,
    quality_draws: int = 1,
    seed: int = 0,
    *,
    tied_psnr: bool = False,
) -> Tables:
    """Return the rewards and costs on a grid of channel states and actions.

    Args:
        params: the environment's numbers; the limits are not read.
        quality, payload: as given to `make_env`.
        bins: equally likely channel bins. Without fading they are distances, else quantiles of drawn SNRs.
        ratios: points of the ratio's grid.
        quality_draws: keys over which -log MSE is averaged; 1 suffices for a source that draws nothing.
        seed: of those draws.
        tied_psnr: as given to `make_env`.

    Raises:
        MegError: fading without a weakest SNR, under which no mean latency exists.
    """
    link = params.link
    if link.fading != "none" and np.all(np.asarray(link.min_snr_db) == -np.inf):
        raise MegError(
            f"fading {link.fading} with min_snr_db {link.min_snr_db}: the deepest fades make the mean "
            "latency infinite; give the link the weakest SNR that is sent at, as LinkParams(min_snr_db=-10)"
        )
    steps = np.arange(int(params.min_steps), int(params.max_steps) + 1)
    actions = np.stack(
        [a.ravel() for a in np.meshgrid(steps, np.linspace(0.0, 1.0, ratios), indexing="ij")], axis=1
    )
    key = jax.random.key(seed)
    snr_S = _channel_bins(key, params, bins)

    def rewards(action: jax.Array) -> jax.Array:
        """Return the rewards [S], or [1] where they do not depend on the channel."""
        keys = jax.random.split(key, quality_draws)
        snr = jnp.asarray(snr_S if tied_psnr else snr_S[:1], action.dtype)

        def mean(snr: jax.Array) -> jax.Array:
            psnr_db = feature_psnr_db(snr, params, tied_psnr)
            return -jnp.mean(jnp.log(jax.vmap(lambda k: quality(k, action[0], action[1], psnr_db))(keys)))

        return jax.vmap(mean)(snr)

    def costs(snr: jax.Array, action: jax.Array) -> jax.Array:
        cost = step_cost(action[0], action[1], snr, params, payload)
        return jnp.stack([cost.latency_s, cost.energy_j / 1000.0])

    actions_j = jnp.asarray(actions, jnp.result_type(float))
    rewards_AxS = np.asarray(jax.lax.map(rewards, actions_j), np.float64)
    costs_SxAxM = jax.jit(jax.vmap(jax.vmap(costs, (None, 0)), (0, None)))(
        jnp.asarray(snr_S, actions_j.dtype), actions_j
    )
    rewards_SxA = np.broadcast_to(rewards_AxS.T, (bins, len(actions)))
    return Tables(rewards_SxA, np.asarray(costs_SxAxM, np.float64), snr_S, actions)


def solve(table: Tables, limits: np.ndarray | tuple[float, ...]) -> Optimum:
    """Return the optimum of (23) on these tables: HiGHS on the master, column generation around it.

    Raises:
        MegError: the limits cannot be met, with the lowest reachable values; limits or tables that are not
            finite.
    """
    limits = np.asarray(limits, float)
    check_reachable(table, limits)
    policy, prices, _ = _column_generation(table.rewards_SxA, table.costs_SxAxM, limits)
    bins = len(table.rewards_SxA)
    reward = float(np.sum(policy * table.rewards_SxA) / bins)
    return Optimum(reward, np.einsum("sa,sam->m", policy, table.costs_SxAxM) / bins, prices, policy)


def reach(table: Tables, limits: np.ndarray | tuple[float, ...]) -> Reach:
    """Return whether any policy meets the limits, and the lowest mean of each cost.

    Raises:
        MegError: limits or tables that are not finite.
    """
    limits, m = np.asarray(limits, float), table.costs_SxAxM.shape[-1]
    if limits.shape != (m,) or not np.all(np.isfinite(limits)):
        raise MegError(f"limits {limits.tolist()}: need {m} finite numbers, one for each cost")
    if not (np.all(np.isfinite(table.rewards_SxA)) and np.all(np.isfinite(table.costs_SxAxM))):
        raise MegError("tables: rewards and costs must be finite; is a number of the problem's NaN?")
    lowest = table.costs_SxAxM.min(axis=1).mean(axis=0)
    # No reward: what is left of the elastic programme is the least common excess.
    *_, excess = _column_generation(np.zeros_like(table.rewards_SxA), table.costs_SxAxM, limits)
    return Reach(bool(np.all(lowest <= limits) and excess <= 1e-9), lowest, float(excess))


def check_reachable(table: Tables, limits: np.ndarray | tuple[float, ...]) -> None:
    """Raise a `MegError` that names the lowest reachable values if no policy meets the limits."""
    found = reach(table, limits)
    if found.feasible:
        return
    lowest = ", ".join(f"{value:.4g}" for value in found.lowest)
    wanted = ", ".join(f"{value:.4g}" for value in np.asarray(limits, float))
    raise MegError(
        f"limits ({wanted}) cannot be met: the lowest reachable means are ({lowest}) one at a time; "
        f"together the limits would have to grow by {100 * found.excess:.3g} %"
    )


def best_constant(table: Tables, limits: np.ndarray | tuple[float, ...]) -> tuple[float, np.ndarray]:
    """Return the reward and the (steps, ratio) of the best action that is blind to the channel."""
    means = table.costs_SxAxM.mean(axis=0)
    allowed = np.all(means <= np.asarray(limits, float) + 1e-9, axis=1)
    if not allowed.any():
        raise MegError("no constant action meets the limits")
    rewards = np.where(allowed, table.rewards_SxA.mean(axis=0), -np.inf)
    best = int(np.argmax(rewards))
    return float(rewards[best]), table.actions_Ax2[best]


def _channel_bins(key: jax.Array, params: EnvParams, bins: int) -> np.ndarray:
    """Return the SNRs of equally likely bins: midpoints in distance, or quantiles of draws under fading."""
    middles = (np.arange(bins) + 0.5) / bins
    link = params.link
    if link.fading == "none" and float(np.asarray(link.shadowing_std_db)) == 0.0:
        low, high = float(np.asarray(link.min_distance_m)), float(np.asarray(link.max_distance_m))
        return np.asarray(channel.snr(jnp.asarray(low + (high - low) * middles), params=link))
    keys = jax.random.split(key, 3)
    shape = (1 << 17,)
    fading = channel.fading_power(channel.sample_fading(keys[0], shape), link)
    distance_m = channel.sample_distance_m(keys[1], link, shape)
    shadowing_db = channel.sample_shadowing_db(keys[2], link, shape)
    return np.quantile(np.asarray(channel.snr(distance_m, fading, shadowing_db, link)), middles)


def _column_generation(
    rewards_SxA: np.ndarray, costs_SxAxM: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Solve the elastic programme: return the policy [S, A], the prices [m], the common relative excess."""
    bins, actions, m = costs_SxAxM.shape
    # Above every price a feasible problem can have at this resolution: the excess then stays 0 unless it must
    # not.
    penalty = 1e4 * (1.0 + np.ptp(rewards_SxA))
    every_bin = np.arange(bins)
    chosen = np.zeros((bins, actions), bool)
    scale = np.abs(limits) + 1e-12
    starts = [np.argmax(rewards_SxA, axis=1), np.argmin((costs_SxAxM / scale).sum(axis=2), axis=1)]
    for best in starts + [np.argmin(costs_SxAxM[..., i], axis=1) for i in range(m)]:
        chosen[every_bin, best] = True
    while True:
        s, a = np.nonzero(chosen)
        columns = len(s)
        # Variables: occupation of each chosen (bin, action), then the common relative excess of the limits.
        objective = np.append(-rewards_SxA[s, a] / bins, penalty)
        upper = np.column_stack([costs_SxAxM[s, a].T / bins, -scale])
        equal = scipy.sparse.csr_matrix(
            (np.ones(columns), (s, np.arange(columns))), shape=(bins, columns + 1)
        )
        result = scipy.optimize.linprog(
            objective, A_ub=upper, b_ub=limits, A_eq=equal, b_eq=np.ones(bins), method="highs"
        )
        if result.status != 0:
            raise MegError(f"the linear programme failed: {result.message}")
        prices = -np.asarray(result.ineqlin.marginals)
        reduced = rewards_SxA - np.tensordot(costs_SxAxM, prices, axes=1)
        best = np.argmax(reduced, axis=1)
        gain = reduced[every_bin, best] + np.asarray(result.eqlin.marginals) * bins
        missing = (gain > 1e-9 * (1.0 + penalty * (prices.max(initial=0.0) > 1e3))) & ~chosen[every_bin, best]
        if not missing.any():
            policy = np.zeros((bins, actions))
            policy[s, a] = result.x[:-1]
            return policy, prices, float(result.x[-1])
        chosen[every_bin[missing], best[missing]] = True
