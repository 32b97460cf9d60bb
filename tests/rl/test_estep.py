"""The E-step's dual against scipy on random Q tables, in both precisions; multipliers that act once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from megjax.rl.estep import Dual, dual_value, e_step_gradient, e_step_newton, particle_weights

STATES, PARTICLES = 16, 24


def reference_dual(x, reward, cost, threshold, bound):
    """Return g of Eq. (40) and its gradient, (41), in plain numpy."""
    eta, lam = x[0], x[1:]
    y = (reward - cost @ lam) / eta
    top = y.max(axis=1, keepdims=True)
    e = np.exp(y - top)
    log_mean = top[:, 0] + np.log(e.mean(axis=1))
    q = e / e.sum(axis=1, keepdims=True)
    value = eta * bound + lam @ threshold + eta * log_mean.mean()
    d_eta = bound + np.mean(log_mean - np.sum(q * y, axis=1))
    d_lam = threshold - np.einsum("sk,skm->m", q, cost) / len(q)
    return value, np.concatenate([[d_eta], d_lam])


def cheapest(cost, bound):
    """Return the lowest mean_s E_q[cost] inside the KL bound: convex in one variable."""
    scale = cost.std()

    def negative(log_eta):
        eta = np.exp(log_eta) * scale
        y = -cost / eta
        top = y.max(axis=1)
        log_mean = top + np.log(np.mean(np.exp(y - top[:, None]), axis=1))
        return eta * bound + eta * log_mean.mean()

    return -scipy.optimize.minimize_scalar(
        negative, bounds=(-10, 10), method="bounded", options={"xatol": 1e-9}
    ).fun


def reduction(cost, bound):
    """Return how many standard deviations every cost can be lowered by at once inside the KL bound."""
    z = (cost - cost.mean(axis=(0, 1))) / cost.std(axis=(0, 1))
    m = cost.shape[-1]
    if m == 1:
        return -cheapest(z[..., 0], bound)

    def along(v):
        w = np.exp(v - v.max())
        return -cheapest(z @ (w / w.sum()), bound)

    options = {"xatol": 1e-6, "fatol": 1e-9, "maxiter": 400}
    return scipy.optimize.minimize(along, np.zeros(m), method="Nelder-Mead", options=options).fun


def feasible_without_kl(cost, threshold):
    """Return whether any q at all meets the thresholds: a linear programme over q."""
    states, particles, m = cost.shape
    upper = (cost / states).reshape(-1, m).T
    equal = np.kron(np.eye(states), np.ones(particles))
    zeros = np.zeros(states * particles)
    return scipy.optimize.linprog(zeros, upper, threshold, equal, np.ones(states)).status == 0


def problem(rng, m, share, bound):
    """Return tables whose thresholds ask for `share` of the reduction that the KL bound allows."""
    reward = rng.normal(size=(STATES, PARTICLES)) + 5 * rng.normal(size=(STATES, 1))
    cost = rng.normal(size=(STATES, PARTICLES, m)) + rng.normal(size=m)
    cost += 0.5 * reward[..., None] * rng.normal(size=m)
    reward, cost = reward * 10 ** rng.uniform(-2, 2), cost * 10 ** rng.uniform(-2, 2, size=m)
    threshold = cost.mean(axis=(0, 1)) - share * reduction(cost, bound) * cost.std(axis=(0, 1))
    return reward, cost, threshold


def solve(reward, cost, threshold, bound, dtype):
    args = [jnp.asarray(x, dtype) for x in (reward, cost, threshold, bound)]
    result = jax.jit(e_step_newton)(*args)
    # The reference solves what the solver was given: the tables as rounded to its precision.
    return result, [np.asarray(x, np.float64) for x in args]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        with jax.enable_x64(True):
            yield np.float64
    else:
        yield np.float32


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [-0.5, 0.3, 0.8, 0.995])
def test_feasible_tables_match_scipy(m, share, dtype):
    rng = np.random.default_rng([m, int(1000 * share) % 997])
    for bound in (0.02, 0.1):
        given = problem(rng, m, share, bound)
        result, (reward, cost, threshold, kl) = solve(*given, bound, dtype)
        assert feasible_without_kl(cost, threshold)
        scale = np.concatenate([[reward.std()], reward.std() / cost.std(axis=(0, 1))])

        def scaled(z, scale=scale, problem=(reward, cost, threshold, kl)):
            value, gradient = reference_dual(z * scale, *problem)
            return value, gradient * scale

        x = np.concatenate([[float(result.dual.eta)], np.asarray(result.dual.lam, np.float64)])
        bounds = [(1e-6, None)] + [(0.0, None)] * m
        starts = [np.concatenate([[1.0], np.zeros(m)]), np.concatenate([[10.0], np.full(m, 10.0)])]
        options = {"ftol": 1e-14, "maxiter": 2000}
        best = min(
            scipy.optimize.minimize(scaled, z, jac=True, bounds=bounds, method="SLSQP", options=options).fun
            for z in starts
        )
        ours, gradient = reference_dual(x, reward, cost, threshold, kl)
        assert ours <= best + 1e-4 * abs(best)
        residual = np.where(x > 0, np.abs(gradient * scale), np.maximum(-gradient * scale, 0)) / reward.std()
        assert residual.max() <= 1e-3
        assert float(result.kkt) <= 1e-3
        slack = threshold - np.einsum("sk,skm->m", np.asarray(result.weights_SxK), cost) / STATES
        inactive = slack > 1e-2 * cost.std(axis=(0, 1))
        assert np.all(np.asarray(result.dual.lam)[inactive] == 0.0)


def test_matches_a_grid_over_both_variables(dtype):
    given = problem(np.random.default_rng(3), 1, 0.5, 0.1)
    result, (reward, cost, threshold, kl) = solve(*given, 0.1, dtype)
    eta, lam = float(result.dual.eta), float(result.dual.lam[0])
    values = [
        reference_dual(np.array([a, b]), reward, cost, threshold, kl)[0]
        for a in np.linspace(0.5, 1.5, 81) * eta
        for b in np.linspace(0.0, 2.0, 81) * lam
    ]
    ours = reference_dual(np.array([eta, lam]), reward, cost, threshold, kl)[0]
    assert ours <= min(values) + 1e-4 * abs(ours)
    assert min(values) - ours < 1e-3 * abs(ours)  # the grid does come near


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_infeasible_tables_give_the_cheapest_q(m, dtype):
    rng = np.random.default_rng(m)
    for bound in (0.02, 0.1):
        given = problem(rng, m, 1.5, bound)
        result, (reward, cost, *_) = solve(*given, bound, dtype)
        lam = np.asarray(result.dual.lam, np.float64)
        within = reward - reward.mean(axis=1, keepdims=True)
        spread = cost - cost.mean(axis=1, keepdims=True)
        limit = 1e4 * np.sqrt(np.mean(within**2)) / np.sqrt(np.mean(spread**2, axis=(0, 1)))
        at_bound = lam > 0.999 * limit
        assert at_bound.any()
        weights = np.asarray(result.weights_SxK, np.float64)
        mixed = cost @ (lam / np.std(cost @ lam))
        assert np.sum(weights * mixed) / STATES <= cheapest(mixed, bound) + 1e-3
        kl = np.mean(np.sum(weights * np.log(np.maximum(weights * PARTICLES, 1e-30)), axis=1))
        np.testing.assert_allclose(kl, bound, rtol=1e-2)
        assert np.all(np.isfinite(weights))


def test_degenerate_tables_stay_finite():
    for reward, cost in [
        (np.zeros((4, 8)), np.zeros((4, 8, 1))),
        (np.ones((4, 8)), np.arange(32.0).reshape(4, 8, 1)),
    ]:
        for threshold in (-1.0, 0.0, 1e6):
            result, _ = solve(reward, cost, np.array([threshold]), 0.1, np.float32)
            assert np.all(np.isfinite(np.asarray(result.weights_SxK)))
            np.testing.assert_allclose(np.sum(np.asarray(result.weights_SxK), axis=1), 1.0, rtol=1e-5)


def test_warm_start_finds_the_same(dtype):
    given = problem(np.random.default_rng(7), 2, 0.6, 0.1)
    cold, _ = solve(*given, 0.1, dtype)
    args = [jnp.asarray(x, dtype) for x in (*given, 0.1)]
    for start in (Dual(jnp.asarray(1e3, dtype), jnp.asarray([5.0, 0.0], dtype)), cold.dual):
        warm = e_step_newton(*args, start)
        np.testing.assert_allclose(warm.weights_SxK, cold.weights_SxK, atol=2e-4)


def test_multipliers_act_once():
    """FSRL subtracts lam Q from its table in place, once an iteration."""
    rng = np.random.default_rng(0)
    reward, cost = rng.normal(size=(STATES, PARTICLES)), rng.normal(size=(STATES, PARTICLES, 2))
    threshold = np.array([-0.05, -0.05])
    args = [jnp.asarray(x, jnp.float32) for x in (reward, cost, threshold)]
    for result in (e_step_newton(*args, 0.1), e_step_gradient(*args, 0.1, iterations=10)):
        lam, eta = np.asarray(result.dual.lam), float(result.dual.eta)
        assert lam.max() > 0.01
        logits = (reward - cost @ lam) / eta
        q = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(result.weights_SxK, q, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(
            result.weights_SxK, particle_weights(result.dual, *args[:2]), rtol=2e-3, atol=1e-5
        )


def test_gradient_solver_descends_and_agrees_in_the_end():
    given = problem(np.random.default_rng(5), 1, 0.4, 0.1)
    args = [jnp.asarray(x / np.std(x), jnp.float32) for x in given[:2]]
    args.append(jnp.asarray(given[2] / np.std(given[1]), jnp.float32))
    start = Dual(jnp.asarray(1.0), jnp.ones(1))
    few = e_step_gradient(*args, 0.1, start, iterations=10)
    assert dual_value(few.dual, *args, 0.1) < dual_value(start, *args, 0.1)
    many = e_step_gradient(*args, 0.1, start, iterations=3000)
    newton = e_step_newton(*args, 0.1)
    np.testing.assert_allclose(
        dual_value(many.dual, *args, 0.1), dual_value(newton.dual, *args, 0.1), rtol=1e-3
    )


def test_x64_gradient_matches_autodiff():
    with jax.enable_x64(True):
        given = problem(np.random.default_rng(9), 3, 0.5, 0.1)
        args = [jnp.asarray(x) for x in given]
        x = np.array([1.3, 0.2, 0.4, 0.1])
        dual = Dual(jnp.asarray(x[0]), jnp.asarray(x[1:]))
        auto = jax.grad(dual_value)(dual, *args, 0.1)
        value, gradient = reference_dual(x, *given, 0.1)
        np.testing.assert_allclose(dual_value(dual, *args, 0.1), value, rtol=1e-10)
        np.testing.assert_allclose(np.concatenate([[auto.eta], auto.lam]), gradient, rtol=1e-8, atol=1e-12)
