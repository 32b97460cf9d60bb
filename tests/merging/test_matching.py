"""Match, merge and unmerge against plain loops, and their properties."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megjax.errors import MegError
from megjax.merging import (
    cosine,
    euclidean,
    match,
    match_best,
    match_partition,
    merge,
    merged_counts,
    partition,
    unmerge,
)
from megjax.merging.matching import best_destination
from tests.merging import reference


@partial(jax.jit, static_argnames=("grid", "rounds", "similarity", "weighted"))
def run(x, key, ratio, grid, rounds=2, similarity=cosine, weighted=True):
    plan = match(x, key, ratio, grid, rounds=rounds, similarity=similarity, weighted=weighted)
    merged = merge(x, plan)
    return plan, merged, unmerge(merged, plan)


run_static = jax.jit(run.__wrapped__, static_argnames=("ratio", "grid", "rounds", "similarity", "weighted"))


@jax.jit
def spread(x, plan):
    return unmerge(merge(x, plan), plan)


def tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 2**31),
    st.sampled_from([cosine, euclidean]),
    st.booleans(),
)
def test_plain_loops_agree(h, w, channels, seed, similarity, weighted):
    grid, key, x = (h, w), jax.random.key(seed), tokens(seed, h * w, channels + 1)
    offsets = reference.offsets_of(partition(key, grid), grid)
    for ratio in (0.0, 0.2, 0.5, 0.75, 0.85, 0.95, 1.0):
        plan, merged, back = run(x, key, jnp.float32(ratio), grid, 2, similarity, weighted)
        counts = [int(c) for c in merged_counts(jnp.float32(ratio), grid)]
        assert int(plan.count) == h * w - sum(counts)
        expected, root, sizes = reference.merge_unmerge(
            x, offsets, grid, counts, similarity.__name__, weighted
        )
        np.testing.assert_allclose(back, expected, atol=2e-6)
        rows = np.asarray(plan.row_N)
        assert all((rows[s] == rows[t]) == (root[s] == root[t]) for s in range(h * w) for t in range(s))
        valid = int(plan.count)
        assert rows.max(initial=0) < valid
        assert not np.asarray(merged)[valid:].any()
        if weighted:  # Token mass: each row stands for as many tokens as were merged into it.
            total = np.asarray(plan.total_M)
            assert total.sum() == h * w
            np.testing.assert_allclose(
                (np.asarray(merged) * total[:, None]).sum(0), np.asarray(x).sum(0), atol=1e-4
            )
            assert sorted(total[:valid]) == sorted(sizes[sorted(set(root.values()))])


@pytest.mark.parametrize(
    ("grid", "ratio", "weighted"),
    [((8, 8), 0.0, True), ((8, 8), 0.4, True), ((7, 5), 0.9, True), ((7, 5), 0.9, False)],
)
def test_static_ratio_gives_the_traced_ratios_tokens_in_shorter_arrays(grid, ratio, weighted):
    x, key = tokens(1, 2, grid[0] * grid[1], 6), jax.random.key(5)
    plan, merged, back = run(x, key, jnp.float32(ratio), grid, weighted=weighted)

    short_plan, short, short_back = run_static(x, key, ratio, grid, weighted=weighted)
    assert short.shape[1] == int(plan.count[0]) == int(short_plan.count[0])
    np.testing.assert_array_equal(short_plan.row_N, plan.row_N)
    np.testing.assert_allclose(short, np.asarray(merged)[:, : short.shape[1]], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(short_back, back, rtol=1e-6, atol=1e-7)


def test_one_trace_for_a_thousand_ratios():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def operator(x, key, ratio):
        plan = match(x, key, ratio, (8, 8))
        return plan.count, unmerge(merge(x, plan), plan)

    x = tokens(0, 64, 4)
    counts = [int(operator(x, jax.random.key(i), np.float32(i / 999))[0]) for i in range(1000)]
    assert counts[0] == 64
    assert counts[-1] == 4  # Two rounds leave a sixteenth.
    assert sorted(counts, reverse=True) == counts


@pytest.mark.parametrize("similarity", [cosine, euclidean])
def test_duplicated_tokens_come_back(similarity):
    x = jnp.repeat(jnp.repeat(tokens(2, 2, 4, 4, 5), 2, axis=1), 2, axis=2).reshape(2, 64, 5)
    for ratio in (0.3, 0.75):
        *_, back = run(x, jax.random.key(1), jnp.float32(ratio), (8, 8), similarity=similarity)
        np.testing.assert_allclose(back, x, atol=1e-6)


def test_permuting_the_batch_commutes():
    x, order = tokens(3, 4, 64, 6), np.array([2, 0, 3, 1])
    _, merged, back = run(x, jax.random.key(0), jnp.float32(0.6), (8, 8))
    _, merged_p, back_p = run(x[order], jax.random.key(0), jnp.float32(0.6), (8, 8))
    np.testing.assert_array_equal(merged_p, merged[order])
    np.testing.assert_array_equal(back_p, back[order])


def test_vmap_over_keys_and_ratios_is_a_loop():
    x, keys, ratios = (
        tokens(4, 3, 64, 4),
        jax.random.split(jax.random.key(2), 3),
        jnp.float32([0.1, 0.6, 0.9]),
    )
    plans, merged, back = jax.vmap(lambda *a: run(*a, (8, 8)))(x, keys, ratios)
    for i in range(3):
        plan, merged_i, back_i = run(x[i], keys[i], ratios[i], (8, 8))
        assert int(plan.count) == int(plans.count[i])
        np.testing.assert_allclose(merged[i], merged_i, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(back[i], back_i, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_gradient_is_the_transposed_average(ratio):
    x, key, weight = tokens(5, 64, 4), jax.random.key(3), tokens(6, 64, 4)
    plan, *_ = run(x, key, jnp.float32(ratio), (8, 8))
    rows = np.eye(64)[np.asarray(plan.row_N)]  # 64 tokens x 64 rows
    average = (rows / np.maximum(rows.sum(0), 1)) @ rows.T

    def loss(x):
        return jnp.sum(weight * run(x, key, jnp.float32(ratio), (8, 8))[2])

    np.testing.assert_allclose(jax.grad(loss)(x), average.T @ weight, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_tokens_merge_as_their_values_in_float32(dtype):
    x = jnp.asarray(tokens(7, 2, 64, 16), dtype)
    plan, merged, back = run(x, jax.random.key(0), jnp.float32(0.5), (8, 8))
    plan32, merged32, _ = run(x.astype(jnp.float32), jax.random.key(0), jnp.float32(0.5), (8, 8))
    assert merged.dtype == back.dtype == dtype
    np.testing.assert_array_equal(plan.row_N, plan32.row_N)
    np.testing.assert_array_equal(merged, merged32.astype(dtype))


def test_a_plan_without_batch_serves_a_batch():
    x = tokens(8, 3, 64, 4)
    plan, *_ = run(x[0], jax.random.key(0), jnp.float32(0.5), (8, 8))
    together = unmerge(merge(x, plan), plan)
    for i in range(3):
        np.testing.assert_allclose(together[i], unmerge(merge(x[i], plan), plan), rtol=1e-6)


@pytest.mark.parametrize("width", [1, 7, 48, 100])
def test_blocks_do_not_change_the_matching(width):
    x, (part, _) = tokens(9, 64, 8), partition(jax.random.key(0), (8, 8))
    a, b = np.asarray(x)[part.source_A], np.asarray(x)[part.destination_B]
    scores = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]
    score, best = best_destination(x, part, cosine, width)
    np.testing.assert_array_equal(best, scores.argmax(1))
    np.testing.assert_allclose(score, scores.max(1), rtol=1e-5)


def test_silent_tokens_have_no_nan():
    x = tokens(10, 64, 4).at[:40].set(0)
    _, merged, back = run(x, jax.random.key(0), jnp.float32(0.5), (8, 8))
    assert np.isfinite(merged).all()
    assert np.isfinite(back).all()


def test_memory_stays_far_below_the_whole_similarity_matrix():
    def forward(x, key, ratio):
        plan = match(x, key, ratio, (128, 128))
        return unmerge(merge(x, plan), plan)

    def extra(channels):
        x = jax.ShapeDtypeStruct((128 * 128, channels), np.float32)
        account = jax.jit(forward).lower(x, jax.random.key(0), np.float32(0)).compile().memory_analysis()
        return account.temp_size_in_bytes + account.output_size_in_bytes

    assert extra(640) < 200e6
    assert extra(4) < 20e6  # The matrix alone would be 201 MB.


def test_bad_input_is_named():
    x = tokens(0, 64, 4)
    with pytest.raises(MegError, match=r"64 tokens on a 7 x 8 grid"):
        match(x, jax.random.key(0), 0.5, (7, 8))
    with pytest.raises(
        MegError, match=r"ratio 0\.99 merges 63 .* at most 60: use a ratio of at most 0\.9375"
    ):
        match_partition(x, partition(jax.random.key(0), (8, 8)), 0.99, (8, 8))
    with pytest.raises(MegError, match=r"from 0 to 1"):
        match_partition(x, partition(jax.random.key(0), (8, 8)), float("nan"), (8, 8))
    plan, merged, _ = run_static(x, jax.random.key(0), 0.99, (8, 8), rounds=1)  # One round clips.
    assert int(plan.count) == len(merged) == 16
    with pytest.raises(MegError, match="63 tokens for a plan of 64"):
        merge(x[:63], plan)
    with pytest.raises(MegError, match="64 rows for a plan of 16"):
        unmerge(x, plan)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), plan)
    with pytest.raises(MegError, match=r"batch \(\) of tokens for plans of batch \(2,\)"):
        merge(x, batch)


@pytest.mark.parametrize("ratio", [0.4, 0.9])
def test_the_best_partition_is_the_one_of_least_change_for_each_picture(ratio):
    x, key, grid = tokens(11, 6, 64, 8), jax.random.key(4), (8, 8)
    plan, chosen = jax.jit(match_best, static_argnums=(2, 3))(x, key, ratio, grid)
    alone = jax.jit(partial(match, similarity=euclidean), static_argnums=(2, 3))
    keys = [jax.random.fold_in(key, i) for i in range(16)]
    changes = [np.square(spread(x, alone(x, key, ratio, grid)) - x).sum((1, 2)) for key in keys]
    best = np.argmin(changes, axis=0)
    assert len(set(best)) > 1
    for picture, i in enumerate(best):
        assert (chosen[picture] == keys[i]).all()
        expected = jax.tree.map(lambda leaf, p=picture: leaf[p], alone(x, keys[i], ratio, grid))
        chex.assert_trees_all_equal(expected, jax.tree.map(lambda leaf, p=picture: leaf[p], plan))


def test_one_trace_finds_the_best_partition_at_every_ratio():
    find = jax.jit(chex.assert_max_traces(match_best, 1), static_argnums=3)
    x = tokens(12, 2, 64, 8)
    changes = []
    for ratio in (0.0, 0.3, 0.6, 0.75, 0.9375):
        plan, _ = find(x, jax.random.key(0), jnp.float32(ratio), (8, 8))
        changes.append(float(np.square(spread(x, plan) - x).sum()))
    assert changes[0] == 0
    assert changes == sorted(changes)
