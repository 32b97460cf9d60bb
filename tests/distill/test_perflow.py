"""Piecewise rectified flow against closed forms: Gaussian data, linear flows, the published timesteps."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion import perflow, perflow_timesteps, schedule
from megjax.diffusion.perflow import velocity, window_edges, window_gains
from megjax.distill.perflow import (
    Pairs,
    chord_target,
    draw_times,
    noisy_start,
    solve_window,
    trajectory_windows,
    window_target,
)
from megjax.errors import MegError
from tests.distill.flows import linear_student

SCHED = schedule()
KINDS = ("ddim_eps", "diff_eps", "velocity")
VARIANCE = 0.3
"""Of the Gaussian data."""


def published_timesteps(steps: int, windows: int = 4) -> list[int]:
    """The rule of the released scheduler, in floats as there."""
    counts = [steps // windows + (1 if i < steps % windows else 0) for i in range(windows)]
    points = []
    for i, count in enumerate(counts):
        start, end = 1 - i / windows, 1 - (i + 1) / windows
        points += [int(1000 * t + 1e-9) for t in np.linspace(start, end, count, endpoint=False)]
    return points


@pytest.mark.parametrize("steps", range(4, 13))
def test_timesteps_are_the_published_ones(steps):
    mine = [perflow_timesteps(SCHED, steps, i) for i in range(steps)]
    assert [int(t) for t, _ in mine] == published_timesteps(steps)
    assert [int(after) for _, after in mine] == [*published_timesteps(steps)[1:], 0]


def test_targets_are_of_the_latents_dtype_whatever_jaxs_default_is():
    z0 = jnp.ones((2, 2, 2, 1), jnp.float32)
    with jax.enable_x64(True):
        z_t, _, target = window_target(
            jax.random.key(0), z0, lambda z, t: gaussian_noise(z, t).astype(jnp.float32), SCHED
        )
    assert z_t.dtype == target.dtype == jnp.float32


def test_windows_share_the_steps_the_noisier_ones_first():
    def timesteps(steps):
        return [int(perflow_timesteps(SCHED, steps, i)[0]) for i in range(steps)]

    assert timesteps(6) == [1000, 875, 750, 625, 500, 250]
    assert timesteps(9) == [1000, 916, 833, 750, 625, 500, 375, 250, 125]


def gaussian_noise(z, t_B):
    """The exact noise predictor for data N(0, VARIANCE)."""
    abar = SCHED.abar[t_B][:, None, None, None]
    return jnp.sqrt(1 - abar) * z / (abar * VARIANCE + 1 - abar)


def ddim_factor(abar, start: int, end: int, steps: int) -> float:
    """z_e / z_s of DDIM on the Gaussian, in float64."""
    factor, stride = 1.0, (start - end) // steps
    for i in range(steps):
        now = start - 1 - i * stride
        after = now - stride if i + 1 < steps else max(end - 1, 0)
        eps = np.sqrt(1 - abar[now]) / (abar[now] * VARIANCE + 1 - abar[now])
        z0 = (1 - np.sqrt(1 - abar[now]) * eps) / np.sqrt(abar[now])
        factor *= np.sqrt(abar[after]) * z0 + np.sqrt(1 - abar[after]) * eps
    return factor


@pytest.mark.parametrize("kind", KINDS)
def test_targets_on_gaussian_data(kind):
    """There every window's flow is a known factor, so that targets follow from z_t alone."""
    z0 = np.sqrt(VARIANCE) * jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
    z_t, t_B, target = window_target(jax.random.key(1), z0, gaussian_noise, SCHED, kind=kind)
    abar = np.asarray(SCHED.abar, np.float64)
    for z, t, got in zip(np.asarray(z_t, np.float64), np.asarray(t_B), np.asarray(target), strict=True):
        start = -(-int(t) // 250) * 250
        end = start - 250
        factor = ddim_factor(abar, start, end, 10)
        z_s = z / (1 + (factor - 1) * (t - start) / (end - start))
        z_e = factor * z_s
        abar_s, abar_e = abar[start - 1], abar[max(end - 1, 0)]
        lam = np.sqrt(abar_e / abar_s)
        want = {
            "ddim_eps": (z_e - lam * z_s) / (np.sqrt(1 - abar_e) - lam * np.sqrt(1 - abar_s)),
            "diff_eps": (z_e - lam * z_s) / (-np.sqrt(1 - abar_s / abar_e) * lam),
            "velocity": (z_e - z_s) / ((end - start) / 1000),
        }[kind]
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("start", [1000, 750, 500])
def test_the_teachers_solver_converges_in_its_order(start):
    """On Gaussian data the flow through a window is the ratio of the standard deviations at its ends."""
    a_s, a_e = (float(SCHED.abar[t - 1]) for t in (start, start - 250))
    exact = np.sqrt((a_e * VARIANCE + 1 - a_e) / (a_s * VARIANCE + 1 - a_s))

    z, ends = jnp.ones((1, 1, 1, 1)), (jnp.array([start]), jnp.array([start - 250]))
    first, second = (
        np.array(
            [abs(solve_window(gaussian_noise, z, *ends, SCHED, S, k).item() - exact) for S in (5, 10, 25)]
        )
        for k in (1, 2)
    )
    for errors, order in ((first, 1), (second, 2)):
        # From 2e-6 down float32's rounding is what is left.
        seen = errors[1:] > 2e-6
        found = np.log(errors[:-1] / errors[1:])[seen] / np.log([2.0, 2.5])[seen]
        assert len(found) > 0
        assert np.all((found > 0.8 * order) & (found < order + 0.6)), (order, errors, found)
    assert second[0] < first[0] / 2


def test_times_lie_on_the_grid_and_in_their_windows():
    t_B, start_B, end_B, window_B = (np.asarray(x) for x in draw_times(jax.random.key(0), 4096, SCHED))
    assert np.all(start_B == 1000 - 250 * window_B)
    assert set(t_B) == set(range(5, 1001, 5))
    assert np.all((end_B < t_B) & (t_B <= start_B))
    assert set(start_B) == {250, 500, 750, 1000}
    assert np.all(start_B - end_B == 250)


def test_windows_are_drawn_in_the_proportions_asked_for_and_times_moved_to_their_start():
    count = 16384
    times = draw_times(jax.random.key(0), count, SCHED, draws=(5, 1, 1, 1), start_share=0.5)
    t_B, start_B, end_B, trajectory_B = (np.asarray(x) for x in times)
    windows = np.array([0, 0, 0, 0, 0, 1, 2, 3])
    assert trajectory_windows(draws=(5, 1, 1, 1)) == tuple(windows)
    np.testing.assert_array_equal(start_B, 1000 - 250 * windows[trajectory_B])
    assert np.all((end_B < t_B) & (t_B <= start_B))
    # Of a binomial share p, five standard errors.
    for share, wanted in [
        *((np.mean(trajectory_B == j), 1 / 8) for j in range(8)),
        (np.mean(t_B == start_B), 0.5 + 0.5 / 50),
    ]:
        assert abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / count)


def test_times_lie_in_their_trajectorys_window_where_the_grid_does_not_meet_its_start():
    times = draw_times(jax.random.key(0), 4096, SCHED, windows=3)
    t_B, start_B, end_B, window_B = (np.asarray(x) for x in times)
    np.testing.assert_array_equal(start_B, np.array([1000, 666, 333])[window_B])
    for got, wanted in zip((start_B, end_B), window_edges(SCHED, times.t_B, 3), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert np.all((end_B < t_B) & (t_B <= start_B))


def test_a_share_of_starts_beyond_one_is_refused():
    with pytest.raises(MegError, match=r"start_share 1\.5"):
        draw_times(jax.random.key(0), 4, SCHED, start_share=1.5)


@pytest.mark.parametrize("draws", [(1, 1), (5, 1, 1, 0)])
def test_draws_that_do_not_fit_the_windows_are_refused(draws):
    with pytest.raises(MegError, match="for each of the 4 windows"):
        draw_times(jax.random.key(0), 4, SCHED, draws=draws)


def test_pure_noise_is_where_the_noisiest_window_starts_and_no_other():
    noise, z0 = jax.random.normal(jax.random.key(0), (2, 4, 2, 2, 1))
    start = jnp.array([1000, 750, 500, 250])
    pure, noised = (noisy_start(noise, z0, SCHED, start, pure_noise=pure) for pure in (True, False))
    np.testing.assert_array_equal(pure[0], noise[0])
    np.testing.assert_array_equal(pure[1:], noised[1:])
    left = np.asarray(noised[0] - np.sqrt(1 - SCHED.abar[-1]) * noise[0])
    np.testing.assert_allclose(left, np.sqrt(SCHED.abar[-1]) * z0[0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_steps_follows_a_flow_that_is_straight_in_each_window(kind):
    factors = (0.7, 1.2, 0.9, 0.8)
    with jax.enable_x64(True):
        exact = dataclasses.replace(SCHED, abar=jnp.asarray(SCHED.abar, jnp.float64))
        z = jax.random.normal(jax.random.key(0), (3, 2, 2, 4), jnp.float64)
        end = z * np.prod(factors)
        student = linear_student(kind, factors, exact)
        follow = jax.jit(lambda steps: perflow(student, z, exact, steps, kind=kind))
        for steps in (4, 5, 6, 7, 8, 11, 12, 50):
            np.testing.assert_allclose(follow(jnp.int32(steps)), end, atol=1e-6)


@pytest.mark.parametrize("t", [1000, 870, 750, 300, 5])
def test_parametrisations_name_one_velocity(t):
    start, end = window_edges(SCHED, jnp.array([t]))
    z_s, z_e = jax.random.normal(jax.random.key(0), (2, 1, 2, 2, 1))
    velocities = []
    for kind in KINDS:
        z_t, t_B, target = chord_target(Pairs(z_s, z_e, start, end), jnp.array([t]), SCHED, kind)
        velocities.append(velocity(SCHED, target, z_t, t_B, kind))
    want = (z_e - z_s) / -0.25
    for got in velocities:
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_gains_at_a_window_s_start_are_a_ddim_step():
    lam, eta = window_gains(SCHED, jnp.array(500), jnp.array(250))
    z, eps = 0.3, -1.1
    abar_s, abar_e = float(SCHED.abar[499]), float(SCHED.abar[249])
    z0 = (z - np.sqrt(1 - abar_s) * eps) / np.sqrt(abar_s)
    want = np.sqrt(abar_e) * z0 + np.sqrt(1 - abar_e) * eps
    assert float(lam * z + eta * eps) == pytest.approx(want, abs=1e-5)


def test_one_trace_serves_every_number_of_steps():
    @jax.jit
    @chex.assert_max_traces(1)
    def run(z, steps):
        return perflow(gaussian_noise_at_all_times, z, SCHED, steps)

    def gaussian_noise_at_all_times(z, t_B):
        return gaussian_noise(z, t_B - 1)

    z = jnp.ones((1, 2, 2, 1))
    assert len({float(run(z, steps)[0, 0, 0, 0]) for steps in range(4, 13)}) == 9


def test_fewer_steps_than_windows_are_refused():
    with pytest.raises(MegError, match="needs at least 4"):
        perflow(gaussian_noise, jnp.ones((1, 2, 2, 1)), SCHED, 3)
    with pytest.raises(MegError, match="at least 4"):
        perflow(gaussian_noise, jnp.ones((1, 2, 2, 1)), SCHED, np.int64(3))
