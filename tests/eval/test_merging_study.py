"""The merging study: what each method charges, what it gives back, and how they are compared."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.merging import methods as m
from eval.merging import study
from eval.merging.curves import Curve, mse_at, ratio_to
from megjax import merging
from megjax.errors import MegError
from megjax.link.wire import HEADER_BYTES

SHAPE = (8, 8, 4)
GRID = (4, 4)
SCALARS = 8 * 8 * 4
CLEAN = jnp.asarray(jnp.inf)


def latent(seed=0, shape=SHAPE):
    """Smooth enough that neighbours are alike, and representable in float16."""
    z = np.random.default_rng(seed).normal(size=shape).cumsum(axis=0).cumsum(axis=1) / 4
    return jnp.asarray(z.astype(np.float16).astype(np.float32))


compiled = functools.cache(jax.jit)


def sent(method, level, z):
    return compiled(method.compress)(jax.random.key(3), z, jnp.asarray(level, jnp.float32), CLEAN)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 16), ("int8", 8)])
def test_merging_charges_the_wire_formats_body(dtype, bits):
    method, tokens, key = (
        m.merged(m.plain, bits_per_scalar=bits),
        merging.to_tokens(latent()),
        jax.random.key(0),
    )

    @jax.jit
    def merge(ratio):
        plan = m.plain(key, tokens, ratio, GRID)
        return merging.merge(tokens, plan), plan

    for ratio in method.levels:
        message = merging.pack(*merge(jnp.float32(ratio)), key, ratio, GRID, dtype=dtype)
        assert method.bits(SHAPE, ratio) == 8 * (len(message) - HEADER_BYTES)


def test_one_round_charges_no_second_round():
    one, two = m.merged(functools.partial(m.plain, rounds=1), rounds=1), m.merged(m.plain)
    assert max(one.levels) == 0.75
    assert max(two.levels) == 15 / 16
    for ratio in one.levels:
        assert one.bits(SHAPE, ratio) == two.bits(SHAPE, ratio)


def test_the_rivals_send_as_many_scalars_as_they_charge():
    z = latent()
    pruned, dropped = m.pruned(), m.dropped_at_random()
    for share in (0.0, 0.125, 0.5, 0.75):
        kept = SCALARS - int(share * SCALARS)
        for method, index in ((pruned, 0 if share == 0 else SCALARS), (dropped, 0)):
            received = sent(method, share, z)
            assert int(jnp.sum(received != 0)) == kept
            assert method.bits(SHAPE, share) == 16 * kept + index
    # A list of 8-bit positions is shorter than a mask of 256 bits for fewer than 32 scalars.
    assert m.pruned().bits(SHAPE, 31 / 32) == 8 * (16 + 8)


@pytest.mark.parametrize("chosen", [False, True])
def test_pooling_sends_one_mean_for_each_pooled_cell(chosen):
    method, z = m.pooled(chosen=chosen), latent()
    for share in (0.0, 0.25, 1.0):
        cells = np.asarray(merging.to_tokens(sent(method, share, z))).reshape(16, 4, 4)
        flat = np.all(cells == cells[:, :1], axis=(1, 2))
        assert flat.sum() == 16 * share
        before = np.asarray(merging.to_tokens(z)).reshape(16, 4, 4)
        np.testing.assert_array_equal(cells[~flat], before[~flat])
        np.testing.assert_allclose(cells[flat], before[flat].mean(1, keepdims=True).repeat(4, 1), rtol=1e-3)
        side = 16 if chosen and 0 < share < 1 else 0
        assert method.bits(SHAPE, share) == 16 * (SCALARS - 12 * 16 * share) + side


def test_precision_uses_no_more_values_than_its_bits_can_name():
    method, z = m.precision(), latent()
    for bits in (1, 2, 4):
        assert len(np.unique(sent(method, float(bits), z))) <= 2**bits
        assert method.bits(SHAPE, bits) == bits * SCALARS
    errors = [float(jnp.mean((sent(method, bits, z) - z) ** 2)) for bits in method.levels]
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", [m.TOMESD, m.DEFAULT, m.DEFAULT + ", Lloyd", "magnitude pruning"])
def test_all_bits_give_the_latent_back(name):
    method, z = m.methods()[name], latent()
    assert method.bits(SHAPE, method.levels[0]) == 16 * SCALARS
    np.testing.assert_allclose(sent(method, method.levels[0], z), z, rtol=1e-6)


def test_names_tell_methods_that_reach_from_all_bits_down():
    for name, method in m.methods().items():
        charged = [method.bits((16, 16, 4), level) for level in method.levels]
        assert charged == sorted(charged, reverse=True), name
        most = {"8 bits": 0.5, "5 bits": 5 / 16}.get(name[-6:], 1.0)
        assert charged[0] == pytest.approx(most * 16 * 1024, abs=4), name


@jax.jit
def squared_error(tokens, plan):
    return jnp.sum((merging.unmerge(merging.merge(tokens, plan), plan) - tokens) ** 2)


@functools.partial(jax.jit, static_argnames="grid")
def lloyd(key, tokens, ratio, iterations, grid=(8, 8)):
    return m.lloyd(key, tokens, ratio, grid, iterations=iterations)


def test_lloyd_never_raises_the_error_and_keeps_the_counts():
    for seed in range(3):
        tokens = merging.to_tokens(latent(seed, (16, 16, 4)))
        for ratio in (0.0, 0.25, 0.5, 0.75, 0.9):
            plans = [lloyd(jax.random.key(seed), tokens, jnp.float32(ratio), n) for n in (0, 1, 4)]
            errors = [float(squared_error(tokens, plan)) for plan in plans]
            assert errors[1] <= errors[0] * (1 + 1e-5)
            assert errors[2] <= errors[1] * (1 + 1e-5)
            merged = [[int(r.merged_A.sum()) for r in plan.rounds] for plan in plans]
            assert merged[0] == merged[1] == merged[2]
            assert sum(merged[0]) == 64 - int(plans[2].count) == int(ratio * 64 + 1e-4)


def test_lloyds_plan_is_rebuilt_from_the_wire():
    tokens, key, ratio = merging.to_tokens(latent(1, (16, 16, 4))), jax.random.key(7), 0.875
    plan = lloyd(key, tokens, jnp.float32(ratio), 3)
    received = merging.unpack(merging.pack(merging.merge(tokens, plan), plan, key, ratio, (8, 8)))
    np.testing.assert_array_equal(received.plan.row_N, plan.row_N)


def test_best_of_takes_the_least_error():
    tokens, key = merging.to_tokens(latent(2, (16, 16, 4))), jax.random.key(5)
    plan_one = jax.jit(functools.partial(m.plain, x_NxD=tokens, ratio=0.5, grid=(8, 8), rounds=1))
    best = m.best_of(lambda key, *_: plan_one(key), 4, key, tokens, jnp.asarray(0.5), (8, 8))
    errors = [float(squared_error(tokens, plan_one(k))) for k in jax.random.split(key, 4)]
    assert float(squared_error(tokens, best)) == pytest.approx(min(errors), rel=1e-5)
    assert max(errors) > 1.01 * min(errors)


def test_noise_falls_on_what_is_sent_alone():
    z = jnp.full((32, 32, 4), 2.0)
    mask = jnp.zeros(z.shape, bool).at[:16].set(True)
    received = m.send(jax.random.key(0), z, mask, jnp.asarray(10.0))
    assert not jnp.any(received[16:])
    noise = np.asarray(received[:16] - 2.0)
    assert noise.std() == pytest.approx(2.0 * 10 ** (-10 / 20), rel=0.05)


def test_an_exponential_curve_is_interpolated_exactly():
    share = np.array([1.0, 0.6, 0.3])  # not evenly spaced, falling
    curve = Curve(share, np.exp(-5 * share)[:, None] * np.array([[0.5, 1.5]]))
    at = np.array([0.2, 0.3, 0.47, 0.9, 1.0])
    np.testing.assert_allclose(mse_at(curve, at), [np.nan, *np.exp(-5 * at[1:])], rtol=1e-12)


def test_the_ratio_is_paired_and_at_equal_bits():
    rng = np.random.default_rng(0)
    of_picture = rng.lognormal(sigma=2.0, size=(1, 40))
    share = np.linspace(0.1, 1, 7)
    baseline = Curve(share, np.exp(-4 * share)[:, None] * of_picture)
    finer = np.linspace(0.05, 1, 12)
    half = Curve(finer, 0.5 * np.exp(-4 * finer)[:, None] * of_picture)
    at = np.array([0.06, 0.2, 0.5, 0.8])  # the first is out of the baseline's reach
    ratio = ratio_to(baseline, half, at, draws=200)
    np.testing.assert_allclose(ratio, 0.5, rtol=1e-9)
    noisy = Curve(finer, half.mse_LxP * rng.lognormal(sigma=0.5, size=(1, 40)))
    wide = ratio_to(baseline, noisy, at, draws=200)
    assert wide.low < wide.value < wide.high
    assert np.isnan(ratio_to(baseline, half, np.array([0.06])).value)


def test_the_study_runs_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    # Plain functions in the networks' places: pictures are shrunk and blown up fourfold.
    few = {m.TOMESD: m.precision(), m.DEFAULT: m.pooled()}
    network = types.SimpleNamespace(image_size=64, params={"vae_encoder": None, "vae_decoder": None})
    monkeypatch.setattr(study, "load_pipeline", lambda model: network)
    monkeypatch.setattr(study, "encode", lambda *a: jnp.tile(a[2][:, ::4, ::4, :1], (1, 1, 1, 4)))
    monkeypatch.setattr(study, "decode", lambda *a: a[2][..., :3].repeat(4, axis=1).repeat(4, axis=2))
    monkeypatch.setattr(study, "methods", lambda: few)
    monkeypatch.setattr(study, "DRAWN", tuple(few))
    folder, document = tmp_path / "runs", tmp_path / "study.md"
    config = study.MergingStudyConfig(
        scenes=3, crops=2, batch=4, psnr_db=20.0, folder=folder, document=document
    )
    document.write_text("Prose.\n\n## Other\n")
    with pytest.raises(MegError, match="has no line '## Figures'"):
        study.run(config)
    document.write_text("Prose.\n\n## Figures\n\nOld.\n")
    (tmp_path / "images").mkdir()
    results = study.run(config)
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "merging-study.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    assert table.count("| **") == 3
    assert document.read_text() == f"Prose.\n\n## Figures\n\n{table}"
    assert (tmp_path / "images" / "merging-study.png").is_file()
    of_scenes = results["kinds"]["scenes"]
    assert of_scenes["pictures"] == 3
    assert of_scenes["methods"][m.TOMESD]["ratio_to_baseline"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    # The channel's noise is there at all bits.
    assert all(figures["mse"][0] > 0 for figures in of_scenes["methods"].values())


def test_too_few_pictures_are_refused():
    with pytest.raises(MegError, match="1 crops"):
        study.run(study.MergingStudyConfig(crops=1))
