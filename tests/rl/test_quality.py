"""Measured quality: tables, files, the live decoder, and problems made of them."""

import dataclasses
import io
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.quality_table.table import QualityTableConfig, live, measure, summary, weights_hash
from megjax.errors import MegError
from megjax.link import channel, profiles
from megjax.link.payload import payload_bits
from megjax.pipeline import load_pipeline
from megjax.rl.env import REFERENCE, action_of
from megjax.rl.optimum import tables
from megjax.rl.problem import (
    ANALYTIC,
    Problem,
    environment,
    in_the_mean,
    measured,
    tabulate,
    wire_payload,
)
from megjax.rl.quality import analytic_mse, load_table, make_table, mean_table, save_table
from tests.small import save_random

STEPS, RATIOS, PSNRS = [4, 8, 12], [0.0, 0.5, 1.0], [5.0, 20.0]
SPREAD = make_table(np.exp(np.random.default_rng(0).normal(size=(5, 3, 3, 2))), STEPS, RATIOS, PSNRS)


def test_table_interpolates_log_mse():
    table = mean_table(SPREAD)
    expected = np.exp(SPREAD.log_mse_PxTxRxS.mean(axis=0))

    @jax.jit
    @jax.vmap
    def at(x):
        return table(jax.random.key(0), *x)

    points = jnp.asarray([[8, 0.5, 20], [6, 0.5, 5], [8, 0.25, 12.5], [99, 2, -9]])
    middle = np.sqrt(expected[0, 1, 0] * expected[1, 1, 0])
    cell = np.exp(np.mean(np.log(expected[1, :2, :])))
    np.testing.assert_allclose(at(points), [expected[1, 1, 1], middle, cell, expected[2, 2, 0]], rtol=1e-5)


def test_a_fine_table_is_the_surface_and_pictures_are_drawn_evenly():
    fine = np.linspace(0, 1, 101)
    at = jax.vmap(jax.vmap(lambda t, r: analytic_mse(jax.random.key(0), t, r, r), (None, 0)), (0, None))
    surface = np.asarray(at(jnp.arange(4.0, 13.0), jnp.asarray(fine, jnp.float32)))
    pair = make_table(np.stack([surface, 2 * surface])[..., None], np.arange(4, 13), fine, [10.0])
    keys = jax.random.split(jax.random.key(0), 2000)
    draws = jax.vmap(lambda k: pair(k, jnp.float32(7), jnp.float32(0.333), jnp.float32(10)))(keys)
    one = float(analytic_mse(keys[0], jnp.float32(7), jnp.float32(0.333), jnp.float32(0)))
    assert set(np.round(np.asarray(draws) / one, 2)) == {1.0, 2.0}
    np.testing.assert_allclose(np.mean(draws) / one, 1.5, atol=0.05)


@pytest.mark.parametrize(
    ("table", "steps", "message"),
    [
        (np.ones((1, 2, 1, 1)), [4], "shape"),
        (np.ones((0, 1, 1, 1)), [4], "shape"),
        (np.ones((1, 2, 1, 1)), [8, 4], "increase"),
        (np.ones((1, 2, 1, 1)), [4, np.inf], "finite"),
        (np.zeros((1, 2, 1, 1)), [4, 8], "positive"),
    ],
)
def test_bad_tables_are_refused(table, steps, message):
    with pytest.raises(MegError, match=message):
        make_table(table, steps, [0.0], [10.0])


def test_saved_tables_come_back(tmp_path):
    path = tmp_path / "deep" / "quality.npz"
    save_table(path, SPREAD._replace(about={"seed": 3}))
    back = load_table(path)
    np.testing.assert_allclose(back.log_mse_PxTxRxS, SPREAD.log_mse_PxTxRxS, atol=1e-6)
    np.testing.assert_array_equal(back.ratios, RATIOS)
    assert back.about == {"seed": 3}
    assert [p.name for p in path.parent.iterdir()] == ["quality.npz"]
    cut = tmp_path / "cut.npz"
    cut.write_bytes(path.read_bytes()[:400])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("cut.npz", "other.npz", "missing.npz"):
        with pytest.raises(MegError, match="not a quality table"):
            load_table(tmp_path / name)


def damaged(how):
    """The bytes of a table that fails in one of the ways that zip files and numpy's headers have."""
    header = b"\x93NUMPY\x01\x00\x16\x00{'descr': ('<f4',      \n"  # a bracket that nothing closes
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.npy", header if how == "header" else bytes(1000))
    whole = bytearray(file.getvalue())
    local, central = 0, whole.rindex(b"PK\x01\x02")
    if how == "encrypted":
        whole[local + 6] |= 1
        whole[central + 8] |= 1
    if how == "method":
        whole[local + 8] = whole[central + 10] = 99
    if how == "stream":
        whole[30 + len("about.npy")] = 0xFF
    return bytes(whole)


@pytest.mark.parametrize("how", ["header", "encrypted", "method", "stream"])
def test_damage_of_every_kind_is_told(how, tmp_path):
    (tmp_path / "bad.npz").write_bytes(damaged(how))
    with pytest.raises(MegError, match=r"bad\.npz is not a quality table"):
        load_table(tmp_path / "bad.npz")


def test_the_optimum_of_a_table_is_exact_over_its_pictures():
    problem = Problem(quality=SPREAD, payload=wire_payload())
    found = tabulate(problem, bins=3, ratios=5)
    # 10 dB is a third of the way from 5 to 20.
    means = (2 * SPREAD.log_mse_PxTxRxS[..., 0] + SPREAD.log_mse_PxTxRxS[..., 1]).mean(axis=0) / 3
    of = {(t, r): -means[i, j] for i, t in enumerate(STEPS) for j, r in enumerate(RATIOS)}
    for action, reward in zip(found.actions_Ax2, found.rewards_SxA[0], strict=True):
        if tuple(action) in of:
            np.testing.assert_allclose(reward, of[tuple(action)], rtol=1e-5, atol=1e-5)
    drawn = tables(REFERENCE, SPREAD, wire_payload(), bins=3, ratios=5, quality_draws=4000)
    np.testing.assert_allclose(drawn.rewards_SxA, found.rewards_SxA, atol=0.08)


def test_a_problem_charges_the_wire_format():
    problem = Problem(payload=wire_payload())
    env = environment(problem)
    _, state = env.reset(jax.random.key(0), problem.params)
    info = env.step(jax.random.key(1), state, action_of(5, 0.4), problem.params)[-1]
    seconds = payload_bits(0.4, 4096, 16) / float(channel.rate_bps(state.snr))
    np.testing.assert_allclose(info["cost"][0], 0.826 + 5 * 0.3007 + seconds, rtol=1e-5)


def surface(ratios=(0.0, 0.9375), **settings):
    """A table of one picture whose record has these settings."""
    return make_table(np.ones((1, 2, len(ratios), 2)), [4, 12], ratios, [5.0, 20.0], {"settings": settings})


def test_a_measured_problem_is_charged_as_it_was_measured():
    paper = profiles.load("paper")
    plain = measured(surface(tome_ratio=0.0), paper, 10.0)
    single = measured(surface((0.0, 0.75), rules="paper"), paper, 10.0)
    unguided = measured(surface(guidance=1.0), paper, 10.0)
    np.testing.assert_allclose(unguided.params.compute.es_step_s, 5.73 / 58, rtol=1e-6)
    np.testing.assert_allclose(plain.params.compute.es_step_s, 2 * 6.76 / 58, rtol=1e-6)
    np.testing.assert_allclose(single.params.compute.es_step_s, 2 * 5.73 / 58, rtol=1e-6)
    # In one round at most three quarters merge, each charged 16 bits.
    assert int(single.payload(jnp.float32(0.9375))) == 1024 * 16 * 16 + 3072 * 16
    assert int(plain.payload(jnp.float32(0.9375))) == payload_bits(0.9375, 4096, 16)
    # A step-timed profile takes its own time of a step.
    timed = profiles.load("table2")
    assert measured(surface(tome_ratio=0.0), timed, 10.0).params.compute.es_step_s == timed.step_s


@pytest.mark.parametrize(
    ("table", "psnr_db", "message"),
    [
        (surface(), 40.0, "psnr_db 40: the table was measured from 5 to 20 dB"),
        (surface(), float("nan"), "psnr_db nan"),
        (surface((0.0, 0.5)), 10.0, "from 0 to 0.5: measure from 0 to 0.9375"),
        (surface((0.1, 0.9375)), 10.0, "from 0.1 to 0.9375: measure from 0"),
        (surface(tome_ratio=0.3), 10.0, "tome_ratio 0.3"),
    ],
)
def test_a_table_that_does_not_say_what_a_policy_may_choose_is_refused(table, psnr_db, message):
    with pytest.raises(MegError, match=message):
        measured(table, profiles.load("paper"), psnr_db)


def test_features_may_meet_the_links_noise():
    """MSE 1 at 5 dB and e at 20: the reward says which PSNR was read."""
    slope = make_table(np.exp([[[[0.0, 1.0]]]]), [4], [0.0], [5.0, 20.0])
    link = dataclasses.replace(REFERENCE.link, min_distance_m=50.0, max_distance_m=100.0)
    problem = Problem(dataclasses.replace(REFERENCE, link=link, psnr_db=-3.0), slope, tied_psnr=True)
    env = environment(problem)
    _, state = env.reset(jax.random.key(0), problem.params)
    reward = env.step(jax.random.key(1), state, jnp.zeros(2), problem.params)[2]
    share = (10 * np.log10(float(state.snr)) - 3.0 - 5.0) / 15.0
    np.testing.assert_allclose(reward, -np.clip(share, 0, 1), atol=1e-4)
    found = tabulate(problem, bins=4, ratios=2)
    shares = (10 * np.log10(found.snr_S) - 3.0 - 5.0) / 15.0
    np.testing.assert_allclose(found.rewards_SxA[:, 0], -np.clip(shares, 0, 1), atol=1e-4)
    assert np.ptp(found.rewards_SxA[:, 0]) > 0.3


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    jax.config.update("jax_disable_most_optimizations", True)
    yield load_pipeline(save_random(tmp_path_factory.mktemp("backbone") / "model"))
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, r"steps \(\): finite numbers that increase"),
        ({"steps": (8, 8)}, "steps .* increase"),
        ({"steps": (0, 8)}, "steps 0: from 1 to 1000"),
        ({"ratios": (0.0, 0.99)}, r"ratio 0.99: from 0 to 0.9375"),
        ({"ratios": (0.5, 0.1)}, "ratios .* increase"),
        ({"psnrs_db": (float("nan"),)}, "psnrs_db .* finite"),
        ({"psnrs_db": (-200.0, 10.0)}, "psnr_db -200.0"),
        ({"draws": 0}, "draws 0: at least 1"),
        ({"pictures": 0}, "pictures 0: at least 1"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 99999999999999999999}, "seed 99999999999999999999: 0 to 4294967295"),
    ],
)
def test_what_would_be_recorded_wrong_is_refused_before_anything_is_measured(
    backbone, monkeypatch, changes, message
):
    monkeypatch.setattr("eval.quality_table.table.draw", None)
    config = QualityTableConfig(**changes)
    for function in (measure, live):
        with pytest.raises(MegError, match=message):
            function(backbone, config)


def test_fewer_steps_than_a_student_has_windows_are_refused(backbone):
    params = backbone.params | {"student": backbone.params["unet"]}
    for windows, steps, message in (
        (8, (4, 12), "steps 4: from 8 to 1000"),
        (16, (16, 20), "16 windows .* 12 steps are measured"),
    ):
        student = dataclasses.replace(backbone, params=params, flow=backbone.flow._replace(windows=windows))
        with pytest.raises(MegError, match=message):
            measure(student, QualityTableConfig(steps=steps))


def test_measured_and_live_quality_agree(backbone, tmp_path):
    """With one picture, an all but perfect channel and no merging nothing is random."""
    config = QualityTableConfig(
        pictures=1, steps=(4, 6), ratios=(0.0, 0.9), psnrs_db=(10.0, 200.0), draws=1, tome_ratio=0.0
    )
    table = measure(backbone, config)
    assert table.log_mse_PxTxRxS.shape == (1, 2, 2, 2)
    assert table.about["weights_sha256"] == weights_hash(backbone)
    assert table.about["settings"]["pictures"] == 1
    source = jax.jit(live(backbone, config))

    def both(*x):
        args = (jax.random.key(5), *map(jnp.float32, x))
        return float(source(*args)), float(table(*args))

    for steps in (4, 6):
        np.testing.assert_allclose(*both(steps, 0.0, 200.0), rtol=1e-4)
        # Another partition and other noise, much the same error.
        np.testing.assert_allclose(*both(steps, 0.9, 10.0), rtol=0.5)
        # Noise alone.
        np.testing.assert_allclose(*both(steps, 0.0, 10.0), rtol=0.3)
    assert both(4, 0.9, 10.0)[0] > both(4, 0.0, 200.0)[0]
    assert "0.9" in summary(table)


def test_rewards_in_the_mean_are_no_draws():
    problem = Problem(quality=SPREAD)
    reward, exact = (
        [float(q(jax.random.key(i), jnp.float32(8.0), jnp.float32(0.5), jnp.float32(10.0))) for i in range(8)]
        for q in (problem.quality, in_the_mean(problem).quality)
    )
    assert len(set(reward)) > 1
    assert len(set(exact)) == 1
    assert in_the_mean(ANALYTIC) is ANALYTIC
