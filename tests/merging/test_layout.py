"""Tokens of latents and partitions of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from megjax.errors import MegError
from megjax.merging import fixed_partition, from_tokens, partition, to_tokens, token_grid

Z = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)


def test_patches_are_2_by_2_neighbours():
    tokens = to_tokens(Z)
    assert tokens.shape == (2, 6, 12)
    for t, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        patch = Z[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(tokens[:, t], patch.reshape(2, 12))


def test_strips_are_4_pixels_in_row_major_order():
    np.testing.assert_array_equal(to_tokens(Z, "strip"), Z.reshape(2, 6, 12))


@pytest.mark.parametrize("layout", ["patch", "strip"])
@pytest.mark.parametrize("batch", [(), (2,), (1, 2)])
def test_from_tokens_undoes_to_tokens(layout, batch):
    z = jnp.broadcast_to(Z[0], (*batch, 4, 6, 3))
    np.testing.assert_array_equal(from_tokens(to_tokens(z, layout), token_grid(4, 6), layout), z)


def test_odd_latents_are_refused():
    with pytest.raises(MegError, match="latent of 5 x 6"):
        to_tokens(jnp.zeros((5, 6, 3)))
    with pytest.raises(MegError, match="need 6 tokens"):
        from_tokens(jnp.zeros((5, 12)), (2, 3))


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (1, 4), (2, 2)])
def test_one_destination_in_each_whole_cell(grid):
    for part, (h, w) in zip(
        partition(jax.random.key(3), grid), (grid, (grid[0] // 2, grid[1] // 2)), strict=True
    ):
        source, destination, slot = map(np.asarray, part)
        order = np.concatenate([source, destination])
        assert sorted(order) == list(range(h * w))
        np.testing.assert_array_equal(order[slot], np.arange(h * w))
        cells = [(d // w // 2) * (w // 2) + d % w // 2 for d in destination]
        assert cells == list(range((h // 2) * (w // 2)))


def test_corners_are_uniform_and_keys_differ():
    part, _ = partition(jax.random.key(0), (64, 64))
    destination = np.asarray(part.destination_B)
    corners = 2 * (destination // 64 % 2) + destination % 2
    assert scipy.stats.chisquare(np.bincount(corners, minlength=4)).pvalue > 1e-3
    other, _ = partition(jax.random.key(1), (64, 64))
    assert (np.asarray(other.destination_B) != destination).mean() == pytest.approx(0.75, abs=0.05)


def test_partition_of_a_key_never_changes():
    """Messages carry a key, not a partition: receivers of other versions must draw the same one."""
    first, second = partition(jax.random.key(2024), (8, 8))
    assert np.asarray(first.destination_B).tolist() == [
        1,
        3,
        12,
        14,
        17,
        18,
        28,
        23,
        41,
        42,
        44,
        38,
        56,
        59,
        60,
        54,
    ]
    assert np.asarray(second.destination_B).tolist() == [1, 6, 9, 11]


def test_fixed_partition_is_the_top_left():
    first, second = fixed_partition((4, 6))
    assert np.asarray(first.destination_B).tolist() == [0, 2, 4, 12, 14, 16]
    assert np.asarray(second.destination_B).tolist() == [0]
