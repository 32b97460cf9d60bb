"""Names and layouts, against what PyTorch's and Flax's reference classes call their tensors."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megjax.weights import names
from tests.weights.make_sdxl_names import SDXL, torch_shapes
from tests.weights.weight_trees import shapes_of

STORED = np.load(Path(__file__).with_name("sdxl_names.npz"))
PARAMETERS = {
    "unet": (1680, 2_567_463_684),
    "vae": (248, 83_653_863),
    "text_encoder": (196, 123_060_480),
    "text_encoder_2": (517, 694_659_840),
}


def stored_shapes(config, layout):
    """Names and shapes that our tree of this config is written under."""
    return {
        names.stored_name(name, slot, layout): names.to_stored(
            np.broadcast_to(0, slot.shape), slot, layout, linear_projection=True
        ).shape
        for name, slot in names.slots(shapes_of(config)).items()
    }


def reference(key):
    lines = (line.decode().split() for line in STORED[key])
    return {name: tuple(map(int, shape[0].split("x"))) if shape else () for name, *shape in lines}


@pytest.mark.parametrize("part", SDXL)
@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_sdxl_matches_the_reference_classes(part, layout):
    ours, theirs = stored_shapes(SDXL[part], layout), reference(f"{part}_{layout}")
    if (part, layout) == ("text_encoder", "torch"):  # transformers 5 dropped the prefix that files have
        theirs = {f"text_model.{name}": shape for name, shape in theirs.items()}
    assert ours == theirs
    assert (len(ours), sum(map(np.prod, ours.values()))) == PARAMETERS[part]


@pytest.mark.parametrize("part", SDXL)
def test_every_reference_name_is_understood(part):
    slots = names.slots(shapes_of(SDXL[part]))
    for layout in ("torch", "flax"):
        stored = reference(f"{part}_{layout}")
        assert sorted(map(names.canonical, stored)) == sorted(slots)
        for name, shape in stored.items():
            slot = slots[names.canonical(name)]
            assert names.to_ours(np.broadcast_to(0, shape), name, slot).shape == slot.shape


@pytest.mark.parity
@pytest.mark.parametrize("part", SDXL)
def test_stored_references_are_the_installed_classes(part):
    pytest.importorskip("diffusers")
    assert torch_shapes(SDXL[part]) == reference(f"{part}_torch")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("encoder.mid_block.attentions.0.query.weight", "encoder.mid_block.attentions.0.to_q.weight"),
        ("decoder.mid_block.attentions.0.proj_attn.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
        ("encoder/mid_block/attentions_0/key/kernel", "encoder.mid_block.attentions.0.to_k.weight"),
        (
            "up_blocks_0/attentions_2/transformer_blocks_9/ff/net_0/proj/kernel",
            "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj.weight",
        ),
        (
            "mid_block/attentions_0/transformer_blocks_0/attn2/to_out_0/bias",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
        ),
        ("add_embedding/linear_1/kernel", "add_embedding.linear_1.weight"),
        ("embeddings.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("encoder.layers.3.layer_norm1.bias", "text_model.encoder.layers.3.layer_norm1.bias"),
        ("text_model/encoder/layers/3/layer_norm1/scale", "text_model.encoder.layers.3.layer_norm1.weight"),
        ("text_projection.weight", "text_projection.weight"),
    ],
)
def test_dialects_have_one_canonical_name(stored, expected):
    assert names.canonical(stored) == expected
    assert names.canonical(expected) == expected


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    st.sampled_from(["torch", "flax"]),
    st.sampled_from(["kernel", "bias", "scale", "embedding"]),
    st.booleans(),
)
def test_layouts_invert_each_other(shape, layout, leaf, linear_projection):
    slot = names.Slot(("proj_in", leaf), None, shape)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    stored = names.to_stored(array, slot, layout, linear_projection=linear_projection)
    name = names.canonical(f"proj_in.{leaf}") if layout == "torch" else f"proj_in/{leaf}"
    np.testing.assert_array_equal(names.to_ours(stored, name, slot), array)


def test_a_dense_layer_is_stored_as_pytorch_multiplies():
    slot = names.Slot(("to_q", "kernel"), None, (2, 3))
    x, kernel = np.ones((1, 2), np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = names.to_stored(kernel, slot, "torch")
    np.testing.assert_array_equal(x @ weight.T, x @ kernel)
    conv = names.Slot(("conv_in", "kernel"), None, (3, 4, 5, 6))
    assert names.to_stored(np.zeros(conv.shape), conv, "torch").shape == (6, 5, 3, 4)


def test_only_stacked_leaves_are_split():
    leaf = jax.ShapeDtypeStruct((2, 7), np.float32)
    tree = {"transformer_blocks": {"norm1": {"scale": leaf}}, "resnets": {"0": {"norm1": {"bias": leaf}}}}
    found = names.slots(tree)
    assert found.pop("resnets.0.norm1.bias").shape == (2, 7)
    assert {name: slot.layer for name, slot in found.items()} == {
        "transformer_blocks.0.norm1.weight": 0,
        "transformer_blocks.1.norm1.weight": 1,
    }


@given(st.lists(st.integers(0, 20), max_size=4).map(tuple), st.permutations(range(4)))
def test_copying_in_strips_copies_everything(shape, axes):
    array = np.random.default_rng(0).standard_normal(shape)
    view = array.transpose([axis for axis in axes if axis < array.ndim])
    into = np.full(view.shape, np.nan, np.float32)
    names.copy_into(into, view)
    np.testing.assert_array_equal(into, view.astype(np.float32))
