"""Pre-training, end to end and small: every stage, resuming, and the folder that comes out."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megjax.data.photos import random_crops
from megjax.errors import MegError
from megjax.models import Network, layout, vae_encoder
from megjax.pipeline import Request, generate, load_pipeline
from megjax.training import pretrain
from megjax.training.denoiser import Captioned
from megjax.training.layout import layout_loss
from megjax.training.loop import fit
from megjax.training.optimizer import make_optimizer
from megjax.training.step import init_state, make_step
from tests.models.cases import random_params
from tests.small import CONFIG


@pytest.fixture
def photos(monkeypatch):
    """Photographs are scikit-image's, which the tests do not need."""
    fake = [np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8)]
    monkeypatch.setattr(pretrain, "load_photos", lambda: fake)


@pytest.fixture
def pools(monkeypatch):
    """Those that the U-Net learns from."""
    found, make = [], pretrain.latent_pool

    def kept(*args):
        found.append(make(*args))
        return found[-1]

    monkeypatch.setattr(pretrain, "latent_pool", kept)
    return found


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused_at_once(tmp_path, seed):
    with pytest.raises(MegError, match=f"seed {seed}: 0 to 4294967295 is allowed"):
        pretrain.pretrain(dataclasses.replace(CONFIG, folder=tmp_path / "run", seed=seed))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def quick(monkeypatch):
    """Parameters drawn without compiling the initialisers, and pools of a quarter."""
    monkeypatch.setattr(
        Network, "init", lambda self, _: jax.tree.map(jnp.asarray, random_params(self.shapes))
    )
    monkeypatch.setattr(pretrain, "POOL_BATCH", 64)


def contents(folder):
    """Weights and configs, the autoencoder's with its latents' statistics."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("config.json")]
    return {file.relative_to(folder): file.read_bytes() for file in files}


def test_all_stages_end_in_a_backbone_that_generates(tmp_path, photos, pools, quick):
    config = dataclasses.replace(CONFIG, folder=tmp_path, pool=64)
    folder = pretrain.pretrain(config)
    assert (folder / "curves.png").is_file()
    (pool,) = pools
    z = np.asarray(pool.data.z0_NxHxWxC, np.float32)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=0.02)
    pipeline = load_pipeline(folder)
    assert pipeline.vae_decoder.config == pool.vae
    out = generate(pipeline, Request("a red circle left of a blue square", steps=2))
    assert np.isfinite(out.image_HxWx3).all()
    # Finished stages are not trained again: the same weights come out.
    before = contents(folder)
    written = (tmp_path / "latents.npz").stat().st_mtime_ns
    assert pretrain.pretrain(config) == folder
    assert contents(folder) == before
    assert (tmp_path / "latents.npz").stat().st_mtime_ns == written
    # Going on from it in its own folder: its encoder normalises already, so the kept latents are others.
    fields = {"start": folder, "layout_steps": 0, "coarse_steps": 0, "steps": 0, "decoder_steps": 0}
    assert pretrain.pretrain(dataclasses.replace(config, **fields)) == folder
    z = np.asarray(pools[-1].data.z0_NxHxWxC, np.float32)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=0.02)
    # What was not trained again is what it started from.
    assert contents(folder) == before


def test_latents_are_kept_for_what_they_depend_on_alone(tmp_path, quick):
    config = dataclasses.replace(CONFIG, folder=tmp_path, pool=64)
    params = vae_encoder(config.vae).init(jax.random.key(0))
    given = {"config": config, "encoder_params": params, "key": jax.random.key(1)}
    first, again = (pretrain.latent_pool(**given).data for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    for change in (
        {"encoder_params": jax.tree.map(lambda p: 1.1 * p, params)},
        {"key": jax.random.key(2)},
        {"config": dataclasses.replace(config, two_objects=0.1)},
    ):
        other = pretrain.latent_pool(**given | change).data
        assert not np.array_equal(first.z0_NxHxWxC, other.z0_NxHxWxC)


@pytest.mark.parametrize("pool", [0, -256, 100, 300])
def test_a_pool_is_whole_batches(tmp_path, pool):
    with pytest.raises(MegError, match=f"pool {pool}: must be a positive multiple of 256"):
        pretrain.pretrain(dataclasses.replace(CONFIG, folder=tmp_path, pool=pool))
    assert list(tmp_path.iterdir()) == []


def quadratic(params, key, batch):
    """Noisy, so that a wrong key shows."""
    noise = 0.1 * jax.random.normal(key, params["x"].shape)
    return jnp.sum(jnp.square(params["x"] - batch + noise)), {}


def test_a_resumed_run_is_the_same_run(tmp_path):
    optimizer = make_optimizer(0.1, 7, warmup=2)
    step = make_step(quadratic, optimizer, 0.9)

    def run(folder, *stops):
        folder.mkdir()
        for steps in stops:
            state = fit(
                step,
                init_state({"x": jnp.arange(3.0)}, optimizer),
                key=jax.random.key(5),
                steps=steps,
                batch_at=lambda i: jnp.full(3, float(i)),
                folder=folder,
                name="run",
                checkpoint_every=2,
            )
        return state

    whole, resumed = run(tmp_path / "a", 7), run(tmp_path / "b", 3, 4, 7)
    chex.assert_trees_all_equal(whole, resumed)
    assert int(whole.step) == 7


def test_ema_forgets_the_start():
    optimizer = optax.sgd(0.0)
    step = make_step(quadratic, optimizer, 0.999)
    state = init_state({"x": jnp.zeros(2)}, optimizer)._replace(params={"x": jnp.ones(2)})
    for n in range(3):
        expected = state.ema["x"] + (1 - min(0.999, (1 + n) / (10 + n))) * (1 - state.ema["x"])
        state, _ = step(state, jax.random.key(0), jnp.zeros(2))
        np.testing.assert_allclose(state.ema["x"], expected, rtol=1e-6)


def test_crops_are_pictures():
    photos = [np.full((70, 200, 3), 255, np.uint8)]
    crops = random_crops(photos, np.random.default_rng(0), 5, 64)
    assert crops.shape == (5, 64, 64, 3)
    np.testing.assert_array_equal(crops, 1.0)


def test_the_layout_head_learns_a_picture_s_halves():
    encoders = pretrain._text_encoders(CONFIG)
    networks = {**encoders, "layout": layout(CONFIG.unet, CONFIG.text_encoder_2.projection_dim)}
    params = pretrain._init(networks, jax.random.key(0))
    z0 = jnp.concatenate([jnp.ones((4, 16, 8, 4)), -jnp.ones((4, 16, 8, 4))], axis=2)
    data = Captioned(z0, jnp.tile(jnp.arange(20), (4, 1)))
    loss = layout_loss(
        (networks["text_encoder"], networks["text_encoder_2"]), networks["layout"], size=(64, 64), batch=8
    )
    # The latent's blur is +1 left and -1 right: a head that says nothing is wrong by 1, one that knows by 0.
    blank = params | {"layout": jax.tree.map(jnp.zeros_like, params["layout"])}
    np.testing.assert_allclose(loss(blank, jax.random.key(1), data)[0], 1.0, rtol=1e-5)
    optimizer = make_optimizer(1e-2, 60, warmup=5)
    step = jax.jit(make_step(loss, optimizer, 0.9))
    state = init_state(params, optimizer)
    for _ in range(60):
        state, metrics = step(state, jax.random.key(2), data)
    assert metrics["loss"] < 0.05
