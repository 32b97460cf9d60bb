"""Folders whose parts are sound alone but do not belong together, or are damaged: refused when read."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from megjax.distill.decoder_run import narrowed
from megjax.distill.export import copy_backbone, save_weights
from megjax.distill.pruning import init_gate
from megjax.errors import MegError, WeightsError
from megjax.models import vae_decoder
from megjax.pipeline import Request, generate, load_pipeline
from megjax.pipeline.device import load_device
from megjax.pipeline.load import EMBEDDED, GATE, read_gate
from megjax.pipeline.split import decode, send
from megjax.pipeline.workload import workload
from tests.small import save_random


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("backbone") / "model")


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        ("text_encoder", "vocab_size", 660, "tokenizer of text_encoder has 661 ids .* vocab_size 660"),
        ("text_encoder_2", "max_position_embeddings", 31, "text_encoder_2 .* 32 tokens, .*embeddings 31"),
        ("unet", "in_channels", 9, "from 9 channels to 4 does not fit a VAE of 4"),
        ("vae", "latent_channels", 16, "does not fit a VAE of 16 latent channels"),
    ],
)
def test_parts_of_different_models(folder, part, field, value, said):
    edit(folder / part / "config.json", **{field: value})
    with pytest.raises(WeightsError, match=said):
        load_pipeline(folder)


def test_one_tokenizer_for_two_encoders(folder):
    shutil.rmtree(folder / "tokenizer_2")
    edit(folder / "model_index.json", tokenizer_2=[None, None])
    with pytest.raises(WeightsError, match="has no tokenizer_2"):
        load_pipeline(folder)


def test_a_damaged_gate(tmp_path):
    folder = shutil.copytree(EMBEDDED["tiny"], tmp_path / "tiny")
    path = folder / GATE
    size = 16 * 16 * 4
    assert read_gate(path, size)["out"]["bias"].shape == (size,)
    with pytest.raises(WeightsError, match=r"gate\.safetensors: holds .* expected .* distil"):
        read_gate(path, size + 1)
    flat = flatten_dict(init_gate(jax.random.key(0), size), sep="/")
    save_file({name: np.asarray(value) for name, value in flat.items() if name != "in/bias"}, path)
    with pytest.raises(WeightsError, match=r"gate\.safetensors: holds .* expected .* distil"):
        read_gate(path, size)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"gate\.safetensors: truncated"):
        load_pipeline(folder)


def test_what_a_killed_write_left_is_no_decoder(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED["tiny"], model)
    (model / "decoders" / ".1234-meg").mkdir()
    assert set(load_pipeline(model).params["decoders"]) == set(load_pipeline("tiny").params["decoders"])
    with pytest.raises(MegError, match="has vae, magnitude_pruning, meg"):
        load_device(model, decoder=".1234-meg")


def test_a_thin_decoder_is_the_devices(folder, tmp_path):
    whole = load_pipeline(folder)
    narrow = vae_decoder(narrowed(whole.vae_decoder.config, 0.5))
    assert narrow.config != whole.vae_decoder.config
    params = narrow.init(jax.random.key(0))
    save_weights(tmp_path / "meg", narrow, params)
    copy_backbone(folder, tmp_path / "thin", {"decoders/meg": tmp_path / "meg"})
    pipeline = load_pipeline(tmp_path / "thin")
    sent = send(jax.random.key(1), jax.random.normal(jax.random.key(2), (1, 16, 16, 4)), 0.0, np.inf)
    shown = decode(pipeline, pipeline.device_decoder, sent.z_BxHxWxC)
    wanted = np.clip(narrow(pipeline.params["decoders"]["meg"], sent.z_BxHxWxC), 0.0, 1.0)
    np.testing.assert_allclose(shown, wanted, atol=1e-6)
    device = load_device(tmp_path / "thin")
    assert device.decoder.config == narrow.config
    assert workload(pipeline, (64, 64)).vae_decoder_flops < workload(whole, (64, 64)).vae_decoder_flops
    assert np.isfinite(generate(pipeline, Request("a red circle", steps=4)).image_HxWx3).all()
    edit(tmp_path / "thin" / "decoders" / "meg" / "config.json", latent_channels=8)
    for load in (load_pipeline, load_device):
        with pytest.raises(WeightsError, match="a decoder of 8 latent channels, 4 pixels each, does not fit"):
            load(tmp_path / "thin")
