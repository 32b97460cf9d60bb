"""Pre-training's losses where their values are known: networks that are functions written here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.diffusion import schedule
from megjax.models import Network, clip_text
from megjax.training.denoiser import COARSE, Captioned, Emphasis, denoiser_loss
from megjax.training.vae import autoencoder_loss, decoder_loss
from tests.models.cases import random_params
from tests.small import CONFIG

SCHED = schedule(spacing="trailing", offset=0)
ABAR = np.asarray(SCHED.abar, float)
EMPTY = jnp.full(32, 660)


@dataclasses.dataclass(frozen=True, eq=False)
class Written(Network):
    """A network whose output is `make` of its parameters and inputs."""

    def __call__(self, params, *args, **kwargs):
        return self.make(params, *args, **kwargs)


def written(function):
    return Written(None, None, {}, function)


@pytest.fixture(scope="module")
def encoders():
    nets = clip_text(CONFIG.text_encoder), clip_text(CONFIG.text_encoder_2)
    params = [jax.tree.map(jnp.asarray, random_params(net.shapes)) for net in nets]
    return nets, {"unet": {}, "text_encoder": params[0], "text_encoder_2": params[1]}


def value(encoders, unet, data, key=0, **options):
    nets, params = encoders
    options = {"text_drop": 0.0, "batch": 64, "emphasis": Emphasis(), **options}
    loss = denoiser_loss(written(unet), nets, SCHED, size=(64, 64), empty_L=EMPTY, **options)
    total, metrics = jax.jit(loss)(params, jax.random.key(key), data)
    return float(total), float(metrics["eps_mse"])


def captions(token):
    return Captioned(jnp.full((4, 8, 8, 4), 0.3), jnp.full((4, 32), token).at[:, -1].set(660))


def beside_the_noise(offset):
    """A U-Net that knows the latents, 0.3 all over, and errs by `offset(abar_t)`."""

    def unet(params, z, t_B, *condition):
        abar = SCHED.abar[t_B][:, None, None, None]
        return (z - jnp.sqrt(abar) * 0.3) / jnp.sqrt(1 - abar) + offset(abar)

    return unet


@pytest.mark.parametrize("emphasis", [Emphasis(0, np.inf), Emphasis(400, np.inf), COARSE])
def test_a_velocity_error_counts_alike_at_every_timestep(encoders, emphasis):
    total, _ = value(encoders, beside_the_noise(jnp.sqrt), captions(5), emphasis=emphasis)
    np.testing.assert_allclose(total, 1 / np.mean(1 / ABAR[emphasis.lowest :]), rtol=1e-3)


def test_the_weight_is_bounded_and_its_mean_is_one(encoders):
    unet = beside_the_noise(lambda abar: jnp.where(abar < 0.1, 1.0, 0.0))  # errs where the bound of 10 holds
    total, share = value(encoders, unet, captions(5), batch=4096)
    np.testing.assert_allclose(total, share * 10 / np.mean(np.minimum(1 / ABAR, 10.0)), rtol=1e-3)
    np.testing.assert_allclose(share, np.mean(ABAR < 0.1), atol=0.03)


def test_noise_is_what_is_predicted(encoders):
    total, error = value(encoders, lambda params, z, *_: jnp.zeros_like(z), captions(5))
    np.testing.assert_allclose(error, 1.0, atol=0.05)
    assert value(encoders, beside_the_noise(jnp.zeros_like), captions(5))[0] < 1e-6 < total


def test_dropped_captions_are_the_empty_prompt(encoders):
    def unet(params, z, t_B, text, pooled, sizes):
        return jnp.zeros_like(z) + jnp.mean(pooled, axis=1)[:, None, None, None]

    a, b, empty = captions(5), captions(9), Captioned(captions(5).z0_NxHxWxC, jnp.tile(EMPTY, (4, 1)))
    none, half, every = ({"text_drop": share} for share in (0.0, 0.5, 1.0))
    assert value(encoders, unet, a, **every) == value(encoders, unet, b, **every)
    np.testing.assert_allclose(
        value(encoders, unet, a, **every), value(encoders, unet, empty, **none), rtol=1e-5
    )
    assert value(encoders, unet, a, **none) != value(encoders, unet, b, **none)
    assert len({value(encoders, unet, a, **drop) for drop in (none, half, every)}) == 3


def test_the_autoencoders_loss():
    mean, logvar, drawn = 0.7, -0.4, 0.25
    image = jnp.zeros((2, 8, 8, 3))
    encoder = written(lambda params, x: (jnp.full((2, 4, 4, 4), mean), jnp.full((2, 4, 4, 4), logvar)))
    loss = autoencoder_loss(encoder, written(lambda params, z: jnp.full((2, 8, 8, 3), drawn)), 0.01)
    total, metrics = loss({"encoder": {}, "decoder": {}}, jax.random.key(0), image)
    kl = 64 * 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(total, drawn**2 + 0.01 * kl / (8 * 8 * 3), rtol=1e-5)
    # What is decoded has the spread that the encoder gives.
    spread = autoencoder_loss(encoder, written(lambda params, z: jnp.full((2, 8, 8, 3), jnp.std(z))), 0.0)
    error = spread({"encoder": {}, "decoder": {}}, jax.random.key(0), image)[0]
    np.testing.assert_allclose(error, np.exp(logvar), rtol=0.3)


def test_the_decoder_learns_from_the_means_alone():
    encoder = written(lambda params, x: (jnp.full((2, 4, 4, 4), params["mean"]), jnp.full((2, 4, 4, 4), 9.0)))
    decoder = written(lambda params, z: jnp.full((2, 8, 8, 3), params["gain"] * jnp.mean(z)))
    loss = decoder_loss(encoder, decoder, {"mean": jnp.float32(2.0)})
    image = jnp.ones((2, 8, 8, 3))
    total, grad = jax.value_and_grad(lambda p: loss(p, jax.random.key(0), image)[0])(
        {"gain": jnp.float32(3.0)}
    )
    np.testing.assert_allclose((total, grad["gain"]), (25.0, 2 * 5 * 2), rtol=1e-6)
