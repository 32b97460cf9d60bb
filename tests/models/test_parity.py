"""The networks against PyTorch diffusers and transformers: stored outputs, and live ones under `parity`."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from megjax.diffusion import Conditioning, ddim, guided, schedule
from megjax.models import clip_text, unet, vae_decoder, vae_encoder
from megjax.models.network import _with_int_keys
from tests.models import cases

BOUND = 1e-5
BOUND_TRAJECTORY = 1e-4


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(cases.REFERENCES))


def distance(ours, reference):
    """Relative L2."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


@functools.cache
def unet_outputs(name):
    config, size = cases.UNETS[name]
    net = unet(config)
    params = cases.random_params(net.shapes)
    z, t, *condition = map(jnp.asarray, cases.unet_inputs(config, size))
    eps = jax.jit(net)(params, z, t, *condition)

    condition = Conditioning(*condition)
    empty = condition._replace(
        text_BxLxE=jnp.zeros_like(condition.text_BxLxE), pooled_BxP=jnp.zeros_like(condition.pooled_BxP)
    )
    run = jax.jit(lambda params, z: ddim(guided(net, params, condition, empty, 5.0), z, schedule(), 8))
    return {"eps": eps, "ddim": run(params, z)}


@functools.cache
def vae_outputs(name):
    config, size = cases.VAES[name]
    encoder, decoder = vae_encoder(config), vae_decoder(config)
    z, image = cases.vae_inputs(config, size)
    mean, logvar = jax.jit(encoder)(cases.random_params(encoder.shapes), image)
    decoded = jax.jit(decoder)(cases.random_params(decoder.shapes), z)
    return {"mean": mean, "std": jnp.exp(logvar / 2), "image": decoded}


@functools.cache
def text_outputs(name):
    net = clip_text(cases.TEXTS[name])
    penultimate, pooled = jax.jit(net)(
        cases.random_params(net.shapes), jnp.asarray(cases.text_inputs(net.config))
    )
    return {"penultimate": penultimate, "pooled": pooled}


OURS = {"unet": unet_outputs, "vae": vae_outputs, "text": text_outputs}
NAMES = [
    *(f"unet/{name}/{k}" for name in cases.UNETS for k in ("eps", "ddim")),
    *(f"vae/{name}/{k}" for name in cases.VAES for k in ("mean", "std", "image")),
    *(f"text/{name}/{k}" for name in cases.TEXTS for k in ("penultimate", "pooled")),
]


def check(name, references):
    kind, case, output = name.split("/")
    bound = BOUND_TRAJECTORY if output == "ddim" else BOUND
    assert distance(OURS[kind](case)[output], references[name]) <= bound


@pytest.mark.parametrize("name", NAMES)
def test_stored_references(name, stored):
    check(name, stored)


def our_block(name):
    """A block of ours with its parameters, by PyTorch's path; a layer is cut out of its stack."""
    kind, path = name.split("/")
    config = {
        "unet": cases.UNETS["odd"][0],
        "vae": cases.VAES["normalised"][0],
        "text": cases.TEXTS["bigg_small"],
    }
    build = {
        "unet": unet,
        "vae": vae_encoder if path.startswith("encoder") else vae_decoder,
        "text": clip_text,
    }
    net = build[kind](config[kind])
    module = nnx.merge(net.graphdef, _with_int_keys(cases.random_params(net.shapes)))
    parts = iter(path.split("."))
    for part in parts:
        if part in ("transformer_blocks", "layers"):
            graphdef, stacked = nnx.split(getattr(module, part))
            layer = int(next(parts))
            module = nnx.merge(graphdef, jax.tree.map(lambda p, i=layer: p[i], stacked))
        else:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


@pytest.fixture(scope="module")
def made():
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    return importlib.import_module("tests.models.make_references")


@pytest.fixture(scope="module")
def live(made):
    return made.references()


@pytest.fixture(scope="module")
def live_blocks(made):
    return made.blocks()


@pytest.mark.parity
class TestLive:
    @pytest.mark.parametrize("name", NAMES)
    def test_live_references(self, name, live):
        check(name, live)

    @pytest.mark.parametrize("name", cases.BLOCKS)
    def test_live_blocks(self, name, live_blocks):
        inputs, expected = live_blocks[name]
        # An odd picture tells the upsampler its size.
        size = [expected.shape[1:3]] if "upsamplers" in name else []
        assert distance(our_block(name)(*map(jnp.asarray, inputs), *size), expected) <= BOUND
