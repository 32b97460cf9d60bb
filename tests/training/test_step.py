"""The update: what is skipped, what is accumulated, what pmap makes of a loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megjax.errors import MegError
from megjax.training.optimizer import make_optimizer
from megjax.training.sharding import make_mesh, replicated, state_shardings
from megjax.training.step import Inputs, Share, init_state, make_step, scalars


def linear(params, key, batch):
    """Least squares; no noise, so that parts of a batch average to the whole."""
    x_BxI, y_B = batch
    error = x_BxI @ params["w"] + params["b"] - y_B
    return jnp.mean(jnp.square(error)), {"error": jnp.mean(error)}


def problem(B=12):
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(B, 3)).astype(np.float32), rng.normal(size=B).astype(np.float32)
    return {"w": jnp.ones(3), "b": jnp.zeros(())}, batch


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_equal_the_whole(parts):
    params, batch = problem()
    optimizer = optax.sgd(0.1)
    whole, split = (jax.jit(make_step(linear, optimizer, 0.9, accumulate=n)) for n in (1, parts))
    state = init_state(params, optimizer)
    (one, metrics), (other, others) = (step(state, jax.random.key(0), batch) for step in (whole, split))
    chex.assert_trees_all_close(one, other, rtol=1e-6)
    chex.assert_trees_all_close(metrics, others, rtol=1e-5)


def test_parts_of_a_batch_have_keys_of_their_own_and_frozen_parameters_are_not_cut():
    def noisy(params, key, inputs):
        noise = jax.random.normal(key, inputs.data.shape)
        assert inputs.frozen.shape == (5,)
        return jnp.mean(params * noise), {"noise": jnp.mean(noise)}

    step = make_step(noisy, optax.sgd(0.1), 0.9, accumulate=3)
    state = init_state(jnp.ones(()), optax.sgd(0.1))
    _, metrics = step(state, jax.random.key(0), Inputs(jnp.zeros(6), jnp.zeros(5)))
    key = jax.random.fold_in(jax.random.key(0), 0)
    expected = [jnp.mean(jax.random.normal(jax.random.fold_in(key, i), (2,))) for i in range(3)]
    assert len(set(map(float, expected))) == 3
    np.testing.assert_allclose(metrics["noise"], np.mean(expected), rtol=1e-6)


def test_a_share_is_averaged_by_its_samples():
    """Of parts without such samples nothing is counted, and of none at all nothing is said."""

    def loss(params, key, kind_B):
        big = kind_B == 2
        share = Share(jnp.sum(jnp.where(big, 3.0, 0.0)), jnp.sum(big, dtype=jnp.float32))
        return params, {"big": share, "none": Share(jnp.zeros(()), jnp.zeros(()))}

    step = jax.jit(make_step(loss, optax.sgd(0.1), 0.9, accumulate=4))
    state = init_state(jnp.ones(()), optax.sgd(0.1))
    _, metrics = step(state, jax.random.key(0), jnp.array([2, 1, 1, 1, 2, 1, 1, 1]))
    found = scalars(metrics, "in_")
    assert found["in_big"] == pytest.approx(3.0)
    assert "in_none" not in found


def test_a_batch_that_does_not_divide_is_refused():
    params, batch = problem(10)
    step = make_step(linear, optax.sgd(0.1), 0.9, accumulate=4)
    with pytest.raises(MegError, match="batch of 10"):
        step(init_state(params, optax.sgd(0.1)), jax.random.key(0), batch)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(where):
    def loss(params, key, bad):
        # sqrt(0) has a finite value and no finite derivative.
        root = jnp.sqrt(jnp.where(bad & (where == "gradient"), 0.0, 1.0) * params["x"])
        return jnp.sum(root) + jnp.where(bad & (where == "loss"), jnp.nan, 0.0), {}

    optimizer = make_optimizer(0.1, 10, warmup=1)
    step = jax.jit(make_step(loss, optimizer, 0.9))
    key = jax.random.key(0)
    state, _ = step(init_state({"x": jnp.ones(2)}, optimizer), key, False)
    state, _ = step(state, key, False)
    after, metrics = step(state, key, True)
    chex.assert_trees_all_equal(after._replace(step=state.step), state)
    assert int(after.step) == 3
    assert metrics["skipped"] == 1
    assert metrics["loss"] == 0
    moved, metrics = step(after, key, False)
    assert metrics["skipped"] == 0
    assert np.all(np.asarray(moved.params["x"]) < np.asarray(after.params["x"]))


def test_an_average_in_host_memory_is_the_same_average():
    optimizer = make_optimizer(0.1, 10, warmup=1)
    states = {}
    for offload in (False, True):
        params, batch = problem(8)
        state = init_state(params, optimizer)
        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
        shardings = state_shardings(state, mesh, offload_ema=offload)
        step = jax.jit(
            make_step(linear, optimizer, 0.9, offload_ema=offload),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        )
        state = jax.device_put(state, shardings)
        for _ in range(3):
            state, _ = step(state, jax.random.key(0), batch)
        states[offload] = state
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states[True].ema)}
    assert kinds == {"pinned_host"}
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, states[True]), jax.tree.map(np.asarray, states[False])
    )
