"""The rule of Eq. (16): one number for static and traced ratios."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.errors import MegError
from megjax.link.counts import merged_counts, most_merged, partition_sizes


@pytest.mark.parametrize("grid", [(64, 64), (8, 8), (100, 100), (7, 9), (1, 5), (2, 2)])
@pytest.mark.parametrize("rounds", [1, 2])
def test_traced_counts_are_the_float32_rule(grid, rounds):
    n, limits = grid[0] * grid[1], most_merged(grid, rounds)
    rng = np.random.default_rng(0)
    ratios = np.float32(np.concatenate([rng.uniform(0, 1, 20000), np.arange(n + 1) / n]))
    wanted = np.floor(ratios * np.float32(n) + np.float32(1e-4)).astype(int)
    counts = jax.jit(jax.vmap(lambda r: merged_counts(r, grid, rounds)))(ratios)
    np.testing.assert_array_equal(sum(map(np.asarray, counts)), np.minimum(wanted, sum(limits)))
    np.testing.assert_array_equal(counts[0], np.minimum(wanted, limits[0]))
    for i in range(0, len(ratios), 997):
        if rounds == 1 or wanted[i] <= sum(limits):
            assert merged_counts(float(ratios[i]), grid, rounds) == tuple(int(c[i]) for c in counts)


def test_every_whole_number_of_tokens_can_be_asked_for():
    for n in (64, 256, 1024, 4096, 16384):
        side = int(n**0.5)
        assert [merged_counts(i / n, (side, side), 1)[0] for i in range(0, 3 * n // 4, 7)] == list(
            range(0, 3 * n // 4, 7)
        )


@pytest.mark.parametrize("ratio", [float("nan"), -0.5, 1.5, float("inf")])
def test_ratios_out_of_range(ratio):
    with pytest.raises(MegError, match="from 0 to 1"):
        merged_counts(ratio, (8, 8))
    clipped = merged_counts(jnp.float32(ratio), (8, 8))
    assert [int(c) for c in clipped] == ([48, 12] if ratio > 1 else [0, 0])


def test_sizes():
    assert partition_sizes((64, 64)) == (3072, 1024)
    assert partition_sizes((5, 7)) == (29, 6)
    assert most_merged((8, 8)) == (48, 12)
    assert most_merged((2, 2)) == (3, 0)
    assert most_merged((1, 9)) == (0, 0)
    assert merged_counts(0.9, (8, 8)) == (48, 9)
    assert merged_counts(0.9, (8, 8), 1) == (48,)
    with pytest.raises(MegError, match="token grid 0 x 4"):
        merged_counts(0.5, (0, 4))
    with pytest.raises(MegError, match=r"two rounds at most 3: use a ratio of at most 0\.75"):
        merged_counts(1.0, (2, 2))
