"""Piecewise rectified flow against closed forms: Gaussian data, linear flows, the published timesteps."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion import Conditioning, guided, perflow, perflow_timesteps, schedule
from megjax.diffusion.perflow import velocity, window_edges, window_gains
from megjax.distill.perflow import (
    Batch,
    Pairs,
    Solved,
    chord_target,
    draw_pairs,
    draw_times,
    perflow_loss,
    solve_window,
    solved_loss,
    student_errors,
    trajectory_windows,
    window_target,
)
from megjax.errors import MegError

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


def test_the_specification_s_examples():
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
    pure, noised = (
        draw_pairs(noise, z0, gaussian_noise, SCHED, start, start - 250, pure_noise=pure)
        for pure in (True, False)
    )
    np.testing.assert_array_equal(pure.z_s_BxHxWxC[0], noise[0])
    np.testing.assert_array_equal(pure.z_s_BxHxWxC[1:], noised.z_s_BxHxWxC[1:])
    left = np.asarray(noised.z_s_BxHxWxC[0] - np.sqrt(1 - SCHED.abar[-1]) * noise[0])
    np.testing.assert_allclose(left, np.sqrt(SCHED.abar[-1]) * z0[0], atol=1e-6)
    factor = ddim_factor(np.asarray(SCHED.abar, np.float64), 1000, 750, 10)
    np.testing.assert_allclose(pure.z_e_BxHxWxC[0], factor * noise[0], rtol=1e-4)


def linear_student(kind, factors, sched):
    """A student whose flow multiplies each window's start by a factor, along a straight line."""

    def student(z, t_B):
        start_B, end_B = window_edges(sched, t_B)
        factor = jnp.asarray(factors)[(1000 - start_B) // 250]
        share = (t_B - start_B).astype(z.dtype) / (end_B - start_B).astype(z.dtype)
        z_s = z / (1 + (factor - 1) * share)[:, None, None, None]
        pairs = Pairs(z_s, z_s * factor[:, None, None, None], start_B, end_B)
        return chord_target(pairs, t_B, sched, kind).target_BxHxWxC

    return student


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


def toy_unet(params, z, t_B, text, pooled, sizes, token_merge=None):
    """A predictor of one number, that hears the text."""
    return params["w"] * z + params["b"] * jnp.mean(text, axis=(1, 2))[:, None, None, None]


def toy_batch(batch: int) -> Batch:
    def condition(value: float) -> Conditioning:
        return Conditioning(jnp.full((batch, 3, 2), value), jnp.zeros((batch, 2)), jnp.zeros((batch, 6)))

    z0 = jax.random.normal(jax.random.key(3), (batch, 2, 2, 1))
    return Batch({"w": jnp.array(0.5), "b": jnp.array(0.0)}, z0, condition(1.0), condition(0.0))


def test_loss_is_the_mean_of_its_windows_and_drops_text():
    batch = toy_batch(256)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    value, metrics = perflow_loss(toy_unet, SCHED, text_drop=0.0)(params, jax.random.key(0), batch)
    key_t = jax.random.split(jax.random.split(jax.random.key(0))[0])[0]
    start_B = draw_times(key_t, 256, SCHED).start_B
    share = [float(np.mean(np.asarray(start_B) == start)) for start in (1000, 750, 500, 250)]
    windows = [float(metrics[f"window_{k}"]) for k in range(4)]
    assert float(value) == pytest.approx(np.dot(share, windows), rel=1e-5)
    without, _ = perflow_loss(toy_unet, SCHED, text_drop=1.0)(params, jax.random.key(0), batch)
    silent = {**params, "b": jnp.array(0.0)}
    same, _ = perflow_loss(toy_unet, SCHED, text_drop=0.0)(silent, jax.random.key(0), batch)
    assert float(without) == pytest.approx(float(same), rel=1e-6)


def test_solved_windows_teach_what_solving_in_the_step_teaches():
    """On Gaussian data with its exact predictor both losses see the same targets."""
    batch = toy_batch(2048)
    edges = [(1000, 750), (750, 500), (500, 250), (250, 0)]
    ends = []
    for k, (start, end) in enumerate(edges):
        start_B, end_B = (jnp.full(2048, x) for x in (start, end))
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), k), batch.z0_BxHxWxC.shape)
        teacher = guided(toy_unet, batch.teacher, batch.prompt, batch.empty, 7.5)
        ends.append(draw_pairs(noise, batch.z0_BxHxWxC, teacher, SCHED, start_B, end_B))
    z_s, z_e = (
        jnp.stack([getattr(p, name) for p in ends], axis=1) for name in ("z_s_BxHxWxC", "z_e_BxHxWxC")
    )
    solved = Solved(z_s, z_e, batch.prompt, batch.empty)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    before, metrics = solved_loss(toy_unet, SCHED)(params, jax.random.key(0), solved)
    within, others = perflow_loss(toy_unet, SCHED)(params, jax.random.key(0), batch)
    assert float(before) == pytest.approx(float(within), rel=0.1)
    for name, value in others.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=0.2)
    more = (2, 1, 1, 1)
    of_more = jnp.array(trajectory_windows(draws=more))
    solved = solved._replace(z_s_BxJxHxWxC=z_s[:, of_more], z_e_BxJxHxWxC=z_e[:, of_more])
    _, metrics = solved_loss(toy_unet, SCHED, draws=more)(params, jax.random.key(1), solved)
    for name, value in others.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_velocity_are_the_same_in_every_parametrisation(kind):
    """A student whose chord ends at z_e + d errs by d/(e - s) in velocity, whatever it predicts."""
    t_B = jnp.array([1000, 800, 700, 505, 250, 5])
    start, end = window_edges(SCHED, t_B)
    z_s, z_e, d = jax.random.normal(jax.random.key(0), (3, 6, 2, 2, 1))
    target = chord_target(Pairs(z_s, z_e, start, end), t_B, SCHED, kind)
    share = ((t_B - start) / (end - start))[:, None, None, None]
    # The other chord through the same z_t: its start moves so that its end is d away.
    other = Pairs(z_s - d * share / (1 - share), z_e + d, start, end)
    output = chord_target(other, t_B, SCHED, kind).target_BxHxWxC
    got = student_errors(output, target, SCHED, kind=kind, measure="velocity")
    slope = (d + d * share / (1 - share)) / -0.25
    np.testing.assert_allclose(got, jnp.mean(slope**2, axis=(1, 2, 3)), rtol=2e-3)


def test_huber_is_the_square_for_small_errors():
    batch = toy_batch(64)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    square, _ = perflow_loss(toy_unet, SCHED)(params, jax.random.key(0), batch)
    wide, _ = perflow_loss(toy_unet, SCHED, huber=1e3)(params, jax.random.key(0), batch)
    narrow, _ = perflow_loss(toy_unet, SCHED, huber=1e-3)(params, jax.random.key(0), batch)
    assert float(wide) == pytest.approx(float(square), rel=1e-6)
    assert float(narrow) < float(square)


def test_no_gradient_reaches_the_teacher():
    batch = toy_batch(16)
    loss = perflow_loss(toy_unet, SCHED)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    grads = jax.grad(lambda teacher: loss(params, jax.random.key(0), batch._replace(teacher=teacher))[0])(
        batch.teacher
    )
    chex.assert_trees_all_close(grads, jax.tree.map(jnp.zeros_like, grads))
