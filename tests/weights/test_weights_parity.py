"""PyTorch's diffusers and transformers load what MegJAX saves, and the other way round."""

import json

import flax.serialization
import jax
import numpy as np
import pytest

from megjax import weights
from megjax.errors import WeightsError
from megjax.weights import names
from tests.weights.weight_trees import CONFIGS, component, same

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


def torch_class(config):
    if name := config.get("_class_name"):
        return getattr(diffusers, name)
    return getattr(transformers, config["architectures"][0])


@pytest.mark.parametrize(
    ("part", "max_shard_bytes"),
    [*((part, None) for part in CONFIGS), ("vae", 60_000), ("text_encoder", 60_000)],
)
def test_pytorch_loads_what_we_save(tmp_path, part, max_shard_bytes):
    _, params, config = component(part)
    weights.save(tmp_path, params, config, max_shard_bytes=max_shard_bytes)
    module, info = torch_class(config).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    slots, leaves = names.slots(params), names.flatten(params)
    state = module.state_dict()
    assert len(state) == len(slots)
    for name, tensor in state.items():
        slot = slots[names.canonical(name)]
        leaf = np.asarray(leaves[slot.path])
        expected = leaf if slot.layer is None else leaf[slot.layer]
        stored = tensor.numpy()
        if slot.path[-1] == "kernel":
            stored = stored.transpose(2, 3, 1, 0) if stored.ndim == 4 else stored.T
        np.testing.assert_array_equal(stored, expected)


def test_pytorch_computes_the_same_with_convolutions_as_projections(tmp_path):
    """The 1 x 1 convolutions that stand for `proj_in` hold the same matrix."""
    _, params, config = component("unet", use_linear_projection=False)
    weights.save(tmp_path, params, config)
    module, info = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    projection = module.mid_block.attentions[0].proj_in
    assert isinstance(projection, torch.nn.Conv2d)
    x = np.random.default_rng(0).standard_normal((1, 64, 2, 2)).astype(np.float32)
    ours = params["mid_block"]["attentions"]["0"]["proj_in"]
    kernel = np.asarray(ours["kernel"]).reshape(64, 64)
    expected = np.einsum("bihw,io->bohw", x, kernel) + np.asarray(ours["bias"])[None, :, None, None]
    with torch.no_grad():
        np.testing.assert_allclose(projection(torch.tensor(x)).numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "dtype", "options"),
    [
        *((part, "float32", {}) for part in CONFIGS),
        ("vae", "float16", {"variant": "fp16"}),
        ("text_encoder", "float16", {"variant": "fp16"}),
        ("vae", "bfloat16", {"max_shard_size": "60KB"}),
        ("text_encoder_2", "bfloat16", {"max_shard_size": "60KB"}),
    ],
)
def test_we_load_what_pytorch_saves(tmp_path, part, dtype, options):
    shapes, params, config = component(part)
    weights.save(tmp_path / "ours", params, config)
    module = torch_class(config).from_pretrained(tmp_path / "ours").to(getattr(torch, dtype))
    module.save_pretrained(tmp_path / "theirs", **options)
    expected = jax.tree.map(lambda x: x.astype(dtype), params)
    assert same(weights.load(tmp_path / "theirs", shapes, dtype=dtype), expected)


def test_pytorch_pickles_are_refused(tmp_path):
    shapes, params, config = component("vae")
    weights.save(tmp_path / "ours", params, config)
    module = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    module.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.bin: PyTorch pickles can run code"):
        weights.load(tmp_path / "theirs", shapes)


def test_msgpack_holds_the_names_of_the_flax_classes(tmp_path):
    """Through Flax's own reader, and the names of diffusers' converter from PyTorch to Flax."""
    _, params, config = component("unet")
    weights.save(tmp_path, params, config, format="msgpack")
    tree = flax.serialization.msgpack_restore((tmp_path / "diffusion_flax_model.msgpack").read_bytes())
    model = diffusers.FlaxUNet2DConditionModel.from_config(json.loads((tmp_path / "config.json").read_text()))
    model = model[0] if isinstance(model, tuple) else model
    expected = jax.eval_shape(model.init_weights, jax.random.PRNGKey(0))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, dict(expected))
