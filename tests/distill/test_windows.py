"""Windows solved beforehand: each trajectory's own noise, chains from the noise to the picture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.diffusion import schedule
from megjax.distill.cache import Block, cached
from megjax.distill.perflow import noisy_start, solve_window
from megjax.distill.windows import solved_windows
from megjax.errors import MegError
from megjax.models import Network
from megjax.pipeline import load_pipeline
from tests.distill.flows import toy_unet

SCHED = schedule()
EMPTY = jnp.zeros((1, 3, 2)), jnp.zeros((1, 2))
Z0 = np.random.default_rng(0).normal(size=(5, 2, 2, 1)).astype(np.float16)
HEARD = np.linspace(0.0, 0.4, 5, dtype=np.float16)


class Toy(Network):
    def __call__(self, params, *args):
        return toy_unet(params, *args)


def examples(start, stop):
    text = np.broadcast_to(HEARD[start:stop, None, None], (stop - start, 3, 2))
    return Block({"z0": Z0[start:stop], "text": text, "pooled": np.zeros((stop - start, 2), np.float16)})


def solve(folder, draws, chained, w=0.6):
    params = {"unet": {"w": jnp.array(w), "b": jnp.array(1.0)}}
    tiny = load_pipeline("tiny")
    toy = Toy(tiny.unet.config, None, {}, nnx.Module)
    pipeline = dataclasses.replace(tiny, unet=toy, params=params)
    rows = solved_windows(
        pipeline,
        cached(folder, {"of": "examples"}, 5, examples),
        EMPTY,
        folder,
        {"of": "windows"},
        4,
        guidance=2.0,
        windows=4,
        draws=draws,
        chained=chained,
        pure_noise=True,
        solver_steps=5,
        solver_order=2,
        seed=3,
    )
    return (np.stack([rows[i][name] for i in range(5)]) for name in ("z_s", "z_e"))


def test_each_window_starts_by_equation_10_or_where_the_one_before_ended(tmp_path):
    draws = (3, 2, 1, 1)
    z_s, z_e = solve(tmp_path, draws, chained=False)
    chain_s, chain_e = solve(tmp_path, draws, chained=True)
    assert z_s.shape == chain_s.shape == (5, 7, 2, 2, 1)
    # The noisiest window is the same in both, and each of its draws has a noise of its own.
    np.testing.assert_array_equal(chain_s[:, :3], z_s[:, :3])
    np.testing.assert_array_equal(chain_e[:, :3], z_e[:, :3])
    assert len(np.unique(z_s[:, :3].reshape(15, -1), axis=0)) == 15
    np.testing.assert_array_equal(chain_s[:, 3:5], chain_e[:, :2])
    np.testing.assert_array_equal(chain_s[:, 5:], chain_e[:, (3, 5)])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2), 6)
    noise = jax.random.normal(key, (1, 2, 2, 1))
    start = noisy_start(noise, jnp.asarray(Z0[2:3], jnp.float32), SCHED, jnp.array([250]))
    np.testing.assert_allclose(z_s[2, 6], start[0], atol=2e-3)


def test_a_window_ends_where_the_guided_teacher_takes_it(tmp_path):
    z_s, z_e = solve(tmp_path, (1, 1, 1, 1), chained=True)

    def teacher(z, t_B):
        return 0.6 * z + 2.0 * HEARD.astype(np.float32)[:, None, None, None]

    for k in range(4):
        start, end = (jnp.full(5, 1000 - 250 * (k + i)) for i in (0, 1))
        want = solve_window(teacher, jnp.asarray(z_s[:, k], jnp.float32), start, end, SCHED, 5, 2)
        np.testing.assert_allclose(z_e[:, k], want, atol=5e-3, rtol=2e-3)


def test_a_chain_cannot_grow(tmp_path):
    with pytest.raises(MegError, match="no window can have more than the one before"):
        solve(tmp_path, (1, 1, 2, 1), chained=True)


@pytest.mark.parametrize("w", [float("nan"), 1e9])
def test_a_teacher_that_is_not_finite_is_not_kept(tmp_path, w):
    with pytest.raises(MegError, match="z_e: not finite in float16"):
        solve(tmp_path, (1, 1, 1, 1), chained=False, w=w)
