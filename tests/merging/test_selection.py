"""The highest scores against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.merging.selection import highest, kth_by_bisection, kth_by_sort

SCORES = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
TIES = np.random.default_rng(1).integers(-2, 3, (4, 50)).astype(np.float32)
EXTREMES = np.resize(np.float32([np.inf, -np.inf, 0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]), (4, 50))


@pytest.mark.parametrize("scores", [SCORES, TIES, EXTREMES], ids=["scores", "ties", "extremes"])
def test_marks_what_a_stable_sort_puts_first(scores):
    marks = jax.jit(jax.vmap(highest, in_axes=(0, None)))
    for count in (0, 1, 7, 25, 49, 50):
        rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
        np.testing.assert_array_equal(marks(scores, jnp.int32(count)), rank < count)


def test_every_backend_selects_the_same():
    ranks = np.random.default_rng(2).integers(0, 2**32, 60, dtype=np.uint32)
    ranks[:20] = ranks[20:40]
    expected = np.sort(ranks)[::-1]
    bisection, by_sort = jax.jit(kth_by_bisection), jax.jit(kth_by_sort)
    for count in range(1, 61):
        assert bisection(ranks, jnp.int32(count)) == by_sort(ranks, jnp.int32(count)) == expected[count - 1]
    with jax.disable_jit():
        assert kth_by_bisection(jnp.asarray(ranks), jnp.int32(9)) == expected[8]
