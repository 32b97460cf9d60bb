"""The linear programme against the whole programme written down, and the reference problem's numbers."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize

from megjax.errors import MegError
from megjax.link.channel import LinkParams
from megjax.rl.env import REFERENCE
from megjax.rl.optimum import Tables, best_constant, check_reachable, reach, solve, tables


@pytest.fixture(scope="module")
def reference():
    return tables()


@pytest.mark.parametrize(
    ("limits", "reward"), [((3.0, 1.8), 3.8688), ((2.5, 1.8), 3.5618), ((4.0, 1.0), 4.2694)]
)
def test_reference_problem(reference, limits, reward):
    best = solve(reference, limits)
    np.testing.assert_allclose(best.reward, reward, atol=1.5e-4)
    assert np.all(best.costs <= np.asarray(limits) + 1e-6)


def test_reference_policy(reference):
    best = solve(reference, (3.0, 1.8))
    steps, ratio = np.mean(best.policy_SxA @ reference.actions_Ax2, axis=0)
    np.testing.assert_allclose([steps, ratio], [4.98, 0.458], atol=0.006)
    np.testing.assert_allclose(best.prices, [0.564, 0.0], atol=1e-3)
    np.testing.assert_allclose(best.costs[0], 3.0, rtol=1e-6)
    above = best.policy_SxA * (reference.costs_SxAxM[..., 0] > 3.0)
    np.testing.assert_allclose(above.sum() / len(above), 0.69, atol=0.01)


@pytest.mark.parametrize(("limit", "reward"), [(3.0, 3.8051), (2.5, 3.5015)])
def test_best_constant_action(limit, reward):
    fine = tables(bins=50, ratios=4001)
    np.testing.assert_allclose(best_constant(fine, (limit, 1.8))[0], reward, atol=3e-4)


def test_column_generation_is_exact():
    rng = np.random.default_rng(0)
    bins, actions = 6, 40
    costs = rng.uniform(1, 2, (bins, actions, 3))
    rewards = costs.sum(axis=2) + rng.normal(size=(bins, actions))
    limits = costs.min(axis=1).mean(axis=0) + 0.25
    table = Tables(rewards, costs, np.ones(bins), np.zeros((actions, 2)))
    whole = scipy.optimize.linprog(
        -rewards.ravel() / bins,
        costs.reshape(-1, 3).T / bins,
        limits,
        np.kron(np.eye(bins), np.ones(actions)),
        np.ones(bins),
    )
    assert reach(table, limits).feasible == (whole.status == 0)
    best = solve(table, limits)
    np.testing.assert_allclose(best.reward, -whole.fun, rtol=1e-8)
    np.testing.assert_allclose(best.prices, -whole.ineqlin.marginals, atol=1e-6)


def test_infeasible_limits_are_named(reference):
    with pytest.raises(MegError, match=r"\(2, 1\.8\) cannot be met.*2\.117"):
        check_reachable(reference, (2.0, 1.8))
    assert reach(reference, (2.12, 1.8)).feasible
    # Each alone can be met, both together cannot: many steps are worth latency only if joules buy them.
    conflict = Tables(np.zeros((1, 2)), np.array([[[1.0, 3.0], [3.0, 1.0]]]), np.ones(1), np.zeros((2, 2)))
    found = reach(conflict, (1.5, 1.5))
    assert not found.feasible
    np.testing.assert_allclose(found.lowest, [1.0, 1.0])
    np.testing.assert_allclose(found.excess, 1 / 3, rtol=1e-6)


def test_fading_worsens_the_optimum():
    """A line of sight costs little, and its lack more."""
    links = [LinkParams(fading=fading, min_snr_db=-40.0) for fading in ("none", "rician", "rayleigh")]
    grids = [tables(dataclasses.replace(REFERENCE, link=link), bins=100, ratios=101) for link in links]
    still, rician, rayleigh = (solve(grid, (3.0, 1.8)).reward for grid in grids)
    assert rician < still - 0.03
    assert rayleigh < rician - 0.1


def test_fading_needs_a_weakest_snr():
    """Without one E[1 / log2(1 + snr)] is infinite, and the optimum would hang on the number of bins."""

    def lowest(bins, **link):
        params = dataclasses.replace(REFERENCE, link=LinkParams(fading="rayleigh", **link))
        return reach(tables(params, bins=bins, ratios=2), (9.0, 9.0)).lowest[0]

    with pytest.raises(MegError, match="min_snr_db -inf: the deepest fades make the mean latency infinite"):
        lowest(50)
    np.testing.assert_allclose(lowest(200, min_snr_db=-10.0), lowest(2000, min_snr_db=-10.0), rtol=1e-3)


@pytest.mark.parametrize("limits", [(np.inf, 1.8), (3.0, np.nan), (3.0,)])
def test_limits_must_be_finite_and_complete(reference, limits):
    with pytest.raises(MegError, match="2 finite numbers"):
        solve(reference, limits)


def test_tables_must_be_finite(reference):
    with pytest.raises(MegError, match=r"tables: .* must be finite"):
        solve(reference._replace(rewards_SxA=np.full_like(reference.rewards_SxA, np.nan)), (3.0, 1.8))
