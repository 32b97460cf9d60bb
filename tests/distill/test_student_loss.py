"""The student's losses: windows solved in the step and before it, whole ways, and their measures."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion import conditioned, guided, perflow, schedule
from megjax.diffusion.perflow import window_edges
from megjax.distill.perflow import (
    Pairs,
    chord_target,
    draw_times,
    noisy_start,
    solve_window,
    trajectory_windows,
)
from megjax.distill.student_loss import (
    Solved,
    perflow_loss,
    pseudo_huber,
    rollout_errors,
    solved_loss,
    student_errors,
    window_metrics,
)
from megjax.training.step import scalars
from tests.distill.flows import linear_student, toy_batch, toy_unet

SCHED = schedule()
KINDS = ("ddim_eps", "diff_eps", "velocity")


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_ways_error_is_the_samplers_and_its_gradient_reaches_every_call(kind):
    noise, z0 = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 4))
    factors = jnp.array([0.7, 1.2, 0.9, 0.8])

    def error(factors):
        return rollout_errors(linear_student(kind, factors, SCHED), noise, z0, SCHED, kind=kind)

    end = perflow(linear_student(kind, factors, SCHED), noise, SCHED, 4, kind=kind)
    np.testing.assert_allclose(error(factors), jnp.mean((end - z0) ** 2, axis=(1, 2, 3)), rtol=1e-4)
    # The way's end is the product of all factors times the noise, whichever call an error is made in.
    got = jax.grad(lambda factors: jnp.sum(error(factors)))(factors)
    slope = jnp.sum(2 * (end - z0) * end) / noise[0].size
    np.testing.assert_allclose(got, slope / factors, rtol=1e-3)


def test_loss_is_the_mean_of_its_windows_and_drops_text():
    batch = toy_batch(256)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    value, metrics = perflow_loss(toy_unet, SCHED, text_drop=0.0)(params, jax.random.key(0), batch)
    key_t = jax.random.split(jax.random.split(jax.random.key(0))[0])[0]
    start_B = draw_times(key_t, 256, SCHED).start_B
    share = [float(np.mean(np.asarray(start_B) == start)) for start in (1000, 750, 500, 250)]
    windows = [scalars(metrics)[f"window_{k}"] for k in range(4)]
    assert float(value) == pytest.approx(np.dot(share, windows), rel=1e-5)
    without, _ = perflow_loss(toy_unet, SCHED, text_drop=1.0)(params, jax.random.key(0), batch)
    silent = {**params, "b": jnp.array(0.0)}
    same, _ = perflow_loss(toy_unet, SCHED, text_drop=0.0)(silent, jax.random.key(0), batch)
    assert float(without) == pytest.approx(float(same), rel=1e-6)


@pytest.mark.parametrize("windows", [1, 3, 4, 6, 7])
def test_each_windows_error_is_counted_as_its_own(windows):
    t = jnp.arange(1, len(SCHED.abar) + 1)
    start, _ = window_edges(SCHED, t, windows)
    found = scalars(window_metrics(start.astype(float), t, SCHED, windows))
    # An error that is the window's start: the mean tells which window's errors were counted.
    assert found == {f"window_{k}": (windows - k) * len(SCHED.abar) // windows for k in range(windows)}


def test_solved_windows_teach_what_solving_in_the_step_teaches():
    """On Gaussian data with its exact predictor both losses see the same targets."""
    batch = toy_batch(2048)
    edges = [(1000, 750), (750, 500), (500, 250), (250, 0)]
    ends = []
    for k, (start, end) in enumerate(edges):
        start_B, end_B = (jnp.full(2048, x) for x in (start, end))
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), k), batch.z0_BxHxWxC.shape)
        teacher = guided(toy_unet, batch.teacher, batch.prompt, batch.empty, 7.5)
        start = noisy_start(noise, batch.z0_BxHxWxC, SCHED, start_B)
        ends.append((start, solve_window(teacher, start, start_B, end_B, SCHED)))
    z_s, z_e = (jnp.stack(z, axis=1) for z in zip(*ends, strict=True))
    solved = Solved(z_s, z_e, batch.prompt, batch.empty)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    before, metrics = solved_loss(toy_unet, SCHED)(params, jax.random.key(0), solved)
    within, others = perflow_loss(toy_unet, SCHED)(params, jax.random.key(0), batch)
    assert float(before) == pytest.approx(float(within), rel=0.1)
    assert scalars(metrics) == pytest.approx(scalars(others), rel=0.2)
    more = (2, 1, 1, 1)
    of_more = jnp.array(trajectory_windows(draws=more))
    solved = solved._replace(z_s_BxJxHxWxC=z_s[:, of_more], z_e_BxJxHxWxC=z_e[:, of_more])
    _, metrics = solved_loss(toy_unet, SCHED, draws=more)(params, jax.random.key(1), solved)
    assert scalars(metrics) == pytest.approx(scalars(others), rel=0.2)


def test_a_way_is_judged_by_the_end_of_its_own_trajectory():
    """Of two whole trajectories of each example the student's ways end where theirs do: no error is left."""
    batch, draws = toy_batch(64), (3, 2, 2, 2)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    student = conditioned(toy_unet, params, batch.prompt)
    noise = jax.random.normal(jax.random.key(1), (3, *batch.z0_BxHxWxC.shape))
    ends = jnp.stack([perflow(student, n, SCHED, 4) for n in noise], axis=1)
    other = jnp.zeros_like(ends[:, :2])
    z_s = jnp.concatenate([noise.swapaxes(0, 1), other, other, other], axis=1)
    z_e = jnp.concatenate([ends * 0, other, other, ends[:, :2]], axis=1)
    solved = Solved(z_s, z_e, batch.prompt, batch.empty)
    loss = partial(solved_loss, toy_unet, SCHED, draws=draws, text_drop=1.0)
    value, metrics = loss(rollout=10.0)(params, jax.random.key(0), solved)
    assert float(metrics["rollout"]) < 1e-10
    plain, _ = loss()(params, jax.random.key(0), solved)
    assert float(value) == pytest.approx(float(plain))
    moved = solved._replace(z_e_BxJxHxWxC=z_e.at[:, 8:].add(1.0).at[:, 7].add(2.0))
    value, metrics = loss(rollout=10.0)(params, jax.random.key(0), moved)
    # The first of both trajectories is 2 off, the second 1, and each example draws one of them.
    assert 1.0 < float(metrics["rollout"]) < 4.0
    wide, wide_metrics = loss(rollout=10.0, rollout_width=0.3)(params, jax.random.key(0), moved)
    assert float(wide_metrics["rollout"]) == pytest.approx(float(metrics["rollout"]))
    assert float(plain) < float(wide) < float(value)


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


def test_pseudo_huber_is_the_error_where_it_is_small_and_its_root_where_large():
    np.testing.assert_allclose(pseudo_huber(jnp.array([0.0, 1e-4]), 0.5), [0.0, 1e-4], rtol=1e-3)
    np.testing.assert_allclose(pseudo_huber(jnp.array([1e6]), 0.5), [1000.0], rtol=1e-3)


def test_no_gradient_reaches_the_teacher():
    batch = toy_batch(16)
    loss = perflow_loss(toy_unet, SCHED)
    params = {"w": jnp.array(0.4), "b": jnp.array(0.1)}
    grads = jax.grad(lambda teacher: loss(params, jax.random.key(0), batch._replace(teacher=teacher))[0])(
        batch.teacher
    )
    chex.assert_trees_all_close(grads, jax.tree.map(jnp.zeros_like, grads))
