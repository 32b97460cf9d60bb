"""Low-rank students: they start as the teacher, change what they should, and equal LoRA's definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megjax.errors import MegError
from megjax.training.lora import init_lora, lora_loss, merge_lora
from megjax.training.step import Inputs, init_state, make_step


def weights():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    return {
        "conv": {"kernel": jax.random.normal(next(keys), (3, 3, 8, 16)), "bias": jnp.zeros(16)},
        "attention": {
            "transformer_blocks": {
                "to_q": {"kernel": jax.random.normal(next(keys), (5, 12, 10))},
                "norm": {"scale": jnp.ones((5, 12))},
            }
        },
        "narrow": {"kernel": jax.random.normal(next(keys), (20, 2))},
    }


def test_factors_have_each_kernels_shape_and_start_at_nothing():
    params = weights()
    factors = init_lora(jax.random.key(1), params, 4)
    shapes = jax.tree.map(jnp.shape, factors)
    assert shapes == {
        "conv": {"kernel": {"a": (72, 4), "b": (4, 16)}},
        "attention": {"transformer_blocks": {"to_q": {"kernel": {"a": (5, 12, 4), "b": (5, 4, 10)}}}},
    }
    jax.tree.map(np.testing.assert_array_equal, merge_lora(params, factors), params)


def test_merged_weights_are_w_plus_scale_ab():
    params = weights()
    factors = jax.tree.map(lambda x: x + 0.1, init_lora(jax.random.key(1), params, 4))
    merged = merge_lora(params, factors, 0.5)
    conv = factors["conv"]["kernel"]
    expected = np.asarray(params["conv"]["kernel"]).reshape(72, 16) + 0.5 * np.asarray(
        conv["a"], np.float64
    ) @ np.asarray(conv["b"], np.float64)
    np.testing.assert_allclose(merged["conv"]["kernel"].reshape(72, 16), expected, rtol=1e-5, atol=1e-5)
    q = factors["attention"]["transformer_blocks"]["to_q"]["kernel"]
    own = params["attention"]["transformer_blocks"]["to_q"]["kernel"]
    for layer in range(5):
        ab = np.asarray(q["a"][layer], np.float64) @ np.asarray(q["b"][layer], np.float64)
        np.testing.assert_allclose(
            merged["attention"]["transformer_blocks"]["to_q"]["kernel"][layer],
            own[layer] + 0.5 * ab,
            rtol=1e-5,
            atol=1e-5,
        )
    np.testing.assert_array_equal(merged["narrow"]["kernel"], params["narrow"]["kernel"])
    assert (
        np.linalg.matrix_rank(np.asarray(merged["conv"]["kernel"] - params["conv"]["kernel"]).reshape(72, 16))
        <= 4
    )


def test_only_factors_are_trained_towards_a_low_rank_target():
    rng = np.random.default_rng(0)
    teacher = {"kernel": jnp.asarray(rng.normal(size=(12, 10)), jnp.float32)}
    change = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 10))

    def loss(params, key, inputs):
        return jnp.mean(jnp.square(params["kernel"] - inputs.data)), {}

    optimizer = optax.adam(0.05)
    step = jax.jit(make_step(lora_loss(loss, 1.0), optimizer, 0.9))
    state = init_state(init_lora(jax.random.key(0), teacher, 2), optimizer)
    target = teacher["kernel"] + jnp.asarray(change, jnp.float32)
    for _ in range(400):
        state, metrics = step(state, jax.random.key(0), Inputs(target, {"teacher": teacher}))
    assert metrics["loss"] < 1e-3 * np.mean(change**2)


def test_merging_keeps_the_weights_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights())
    merged = merge_lora(params, init_lora(jax.random.key(0), params, 2))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))


@pytest.mark.parametrize("rank", [0, 100])
def test_ranks_that_make_no_sense_are_refused(rank):
    with pytest.raises(MegError, match=f"LoRA rank {rank}"):
        init_lora(jax.random.key(0), weights(), rank)
