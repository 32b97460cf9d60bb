"""Loading: exact, streamed to its dtype and sharding, and whatever is wrong is one clear error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megjax import weights
from megjax.errors import WeightsError
from megjax.weights import formats
from megjax.weights.stored import DTYPES
from tests.weights.weight_trees import CONFIGS, component, same

FORMATS = ("safetensors", "msgpack")
CLIP_FILES = {"safetensors": "model.safetensors", "msgpack": "flax_model.msgpack"}


@pytest.mark.parametrize("part", CONFIGS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("max_shard_bytes", [None, 50_000])
def test_load_returns_what_save_wrote(tmp_path, part, format, max_shard_bytes):
    shapes, params, config = component(part)
    weights.save(tmp_path, params, config, format=format, max_shard_bytes=max_shard_bytes)
    assert same(weights.load(tmp_path, shapes), params)
    assert json.loads((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_half_precision_is_bit_exact(tmp_path, dtype, format):
    shapes, params, config = component("text_encoder", dtype)
    weights.save(tmp_path, params, config, format=format)
    assert same(weights.load(tmp_path, shapes, dtype=dtype), params)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert same(weights.load(tmp_path, shapes), widened)  # the shapes say float32


@pytest.mark.parametrize("format", FORMATS)
def test_load_casts_each_leaf(tmp_path, format):
    shapes, params, config = component("text_encoder")
    weights.save(tmp_path, params, config, format=format)
    narrowed = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert same(weights.load(tmp_path, shapes, dtype=jnp.bfloat16), narrowed)


def test_flax_files_are_read_as_flax_reads_them(tmp_path, monkeypatch):
    shapes, params, _ = component("vae")
    # So that arrays are chunked, as those of more than 1 GiB are.
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 10_000)
    weights.save(tmp_path, params, {"_class_name": "AutoencoderKL"}, format="msgpack")
    data = (tmp_path / "diffusion_flax_model.msgpack").read_bytes()
    assert b"__msgpack_chunked_array__" in data
    tree = flax.serialization.msgpack_restore(data)
    kernel = tree["encoder"]["mid_block"]["attentions_0"]["query"]["kernel"]
    np.testing.assert_array_equal(
        kernel, params["encoder"]["mid_block"]["attentions"]["0"]["query"]["kernel"]
    )
    # And what Flax writes itself, in its own order of keys.
    (tmp_path / "diffusion_flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    assert same(weights.load(tmp_path, shapes), params)


def test_variants(tmp_path):
    shapes, params, config = component("text_encoder")
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    weights.save(tmp_path / "half", half, config, max_shard_bytes=20_000)
    index = tmp_path / "half" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name in set(content["weight_map"].values()):
        (tmp_path / "half" / name).rename(tmp_path / "half" / name.replace("model-", "model.fp16-"))
    content["weight_map"] = {k: v.replace("model-", "model.fp16-") for k, v in content["weight_map"].items()}
    index.unlink()
    index.with_name("model.safetensors.index.fp16.json").write_text(json.dumps(content))
    assert same(weights.load(tmp_path / "half", shapes, dtype=jnp.float16), half)  # the only one there is

    weights.save(tmp_path / "both", params, config)
    weights.save(tmp_path / "other", half, config)
    (tmp_path / "other/model.safetensors").rename(tmp_path / "both/model.fp16.safetensors")
    assert same(weights.load(tmp_path / "both", shapes), params)
    assert same(weights.load(tmp_path / "both", shapes, dtype=jnp.float16, variant="fp16"), half)
    with pytest.raises(WeightsError, match="no weights of variant 'bf16'; there are fp16, plain"):
        weights.load(tmp_path / "both", shapes, variant="bf16")


def test_old_names_and_buffers(tmp_path):
    """Checkpoints older than PyTorch's present names: the VAE's attention, the text encoder's buffers."""
    shapes, params, config = component("vae")
    weights.save(tmp_path / "vae", params, config)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in safetensors.numpy.load_file(file).items():
        for new, former in old.items():
            if f".{new}." in name:
                name = name.replace(new, former)
                value = (
                    value[:, :, None, None] if name.endswith("weight") else value
                )  # once 1 x 1 convolutions
        tensors[name] = value
    assert any("proj_attn" in name for name in tensors)
    safetensors.numpy.save_file(tensors, file)
    assert same(weights.load(tmp_path / "vae", shapes), params)

    shapes, params, config = component("text_encoder")
    weights.save(tmp_path / "clip", params, config)
    file = tmp_path / "clip" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): x for name, x in safetensors.numpy.load_file(file).items()}
    tensors["embeddings.position_ids"] = np.arange(77)[None]
    safetensors.numpy.save_file(tensors, file)
    assert same(weights.load(tmp_path / "clip", shapes), params)


def test_projections_that_are_convolutions(tmp_path):
    shapes, params, config = component("unet", use_linear_projection=False)
    weights.save(tmp_path, params, config)
    stored = safetensors.numpy.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored["mid_block.attentions.0.proj_in.weight"].shape == (64, 64, 1, 1)
    assert same(weights.load(tmp_path, shapes), params)


def _edit(folder, change, **kwargs):
    """Save a small text encoder with its stored tensors changed, and return its shapes."""
    shapes, params, config = component("text_encoder")
    weights.save(folder, params, config, **kwargs)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    return shapes


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    def change(tensors):
        for layer in range(3):
            for norm in ("layer_norm1", "layer_norm2"):
                del tensors[f"text_model.encoder.layers.{layer}.{norm}.bias"]
        tensors["logit_scale"] = np.zeros((), np.float32)
        tensors["text_model.encoder.layers.0.mlp.fc1.weight"] = np.zeros((32, 64), np.float32)
        tensors["text_model.final_layer_norm.bias"] = np.zeros(32, np.int8)

    shapes = _edit(tmp_path, change)
    with pytest.raises(WeightsError) as caught:
        weights.load(tmp_path, shapes)
    message = str(caught.value)
    assert "\n" not in message
    for said in (
        "model.safetensors: 6 tensors missing: text_model.encoder.layers.",
        "and 2 more",
        "1 tensor unexpected: logit_scale",
        "1 tensor misshapen: text_model.encoder.layers.0.mlp.fc1.weight is (32, 64), expected (64, 32)",
        "1 tensor of another type: text_model.final_layer_norm.bias is I8, expected float32, float16,",
    ):
        assert said in message


def test_one_tensor_under_two_names(tmp_path):
    def change(tensors):
        tensors["final_layer_norm.bias"] = tensors["text_model.final_layer_norm.bias"]

    shapes = _edit(tmp_path, change)
    with pytest.raises(WeightsError, match="1 tensor unexpected: "):
        weights.load(tmp_path, shapes)


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, jnp.float32), (np.inf, jnp.float32), (1e6, jnp.float16)]
)
def test_values_that_the_dtype_cannot_hold(tmp_path, value, dtype):
    def change(tensors):
        tensors["text_model.final_layer_norm.bias"][3] = value

    shapes = _edit(tmp_path, change)
    with pytest.raises(
        WeightsError, match=f"text_model.final_layer_norm.bias is not finite in {np.dtype(dtype)}"
    ):
        weights.load(tmp_path, shapes, dtype=dtype)


def test_files_that_are_not_weights(tmp_path):
    shapes, params, config = component("text_encoder")
    with pytest.raises(WeightsError, match="no such folder"):
        weights.load(tmp_path / "nothing", shapes)
    with pytest.raises(WeightsError, match=r"no weights; expected diffusion_pytorch_model\.safetensors or"):
        weights.load(tmp_path, shapes)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(WeightsError, match=r"pytorch_model.bin: PyTorch pickles can run code"):
        weights.load(tmp_path, shapes)
    weights.save(tmp_path, params, config)
    assert same(weights.load(tmp_path, shapes), params)


def _sharded(folder: Path) -> tuple[dict, dict]:
    shapes, params, config = component("text_encoder")
    weights.save(folder, params, config, max_shard_bytes=30_000)
    return shapes, json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda folder, index: sorted(folder.glob("model-00002-*"))[0].unlink(),
            "1 shard missing: model-00002",
        ),
        (
            lambda folder, index: index["weight_map"].update(more="model-00001-of-00005.safetensors"),
            "lacks more",
        ),
        (
            lambda folder, index: index["weight_map"].update(more="../model.safetensors"),
            "must lie in the index's",
        ),
        (lambda folder, index: index.pop("weight_map"), "no weight_map"),
        (lambda folder, index: index.update(weight_map={"a": 1}), "no weight_map"),
        (
            lambda folder, index: shutil.copy(
                folder / "model-00001-of-00005.safetensors", folder / "model-00002-of-00005.safetensors"
            ),
            "model-00002-of-00005.safetensors: lacks",
        ),
    ],
)
def test_broken_indices(tmp_path, wrong, said):
    shapes, index = _sharded(tmp_path)
    assert len(set(index["weight_map"].values())) == 5
    wrong(tmp_path, index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=said):
        weights.load(tmp_path, shapes)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":')
    with pytest.raises(WeightsError, match="not readable as JSON"):
        weights.load(tmp_path, shapes)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, Path]:
    """The same small weights, whole, in both formats."""
    _, params, config = component("text_encoder")
    folders = {format: tmp_path_factory.mktemp(format) for format in FORMATS}
    for format, folder in folders.items():
        weights.save(folder, params, config, format=format)
    return {format: folder / CLIP_FILES[format] for format, folder in folders.items()}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FORMATS), st.data())
def test_truncated_files(whole_files, tmp_path, format, data):
    complete = whole_files[format].read_bytes()
    size = data.draw(st.integers(0, len(complete) - 1) | st.integers(0, 300))
    (tmp_path / "x").mkdir(exist_ok=True)
    for old in (tmp_path / "x").iterdir():
        old.unlink()
    (tmp_path / "x" / whole_files[format].name).write_bytes(complete[:size])
    with pytest.raises(WeightsError, match=f"{whole_files[format].name}: truncated or not"):
        weights.load(tmp_path / "x", component("text_encoder").shapes)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_headers(whole_files, tmp_path, format, data):
    """A changed byte may go unseen if it is in a value, but never ends in anything but a `WeightsError`."""
    damaged = bytearray(whole_files[format].read_bytes())
    at = data.draw(st.integers(0, 400) | st.integers(0, len(damaged) - 1))
    damaged[at] = data.draw(st.integers(0, 255))
    file = tmp_path / whole_files[format].name
    file.write_bytes(damaged)
    try:
        found = formats.tensors(file)
        for tensor in found.values():
            if tensor.dtype in DTYPES:
                assert tensor.read().shape == tensor.shape
    except WeightsError:
        pass


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1},
        {"a": [np.zeros(2, np.float32)]},
        np.zeros(2, np.float32),
        {"a": 1 + 2j},
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {}}},
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": 1}}},
        {"a": {"__msgpack_chunked_array__": True, "shape": 3, "chunks": {"0": np.zeros(2, np.float32)}}},
        {
            "a": {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 3},
                "chunks": {"0": np.zeros(2, np.float32)},
            }
        },
    ],
)
def test_msgpack_that_is_no_tree_of_arrays(tmp_path, tree):
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(
        WeightsError, match=r"flax_model.msgpack: (truncated or not Flax msgpack|\d+ tensors missing)"
    ):
        weights.load(tmp_path, component("text_encoder").shapes)


def test_nothing_is_read_before_all_names_are_right(tmp_path, monkeypatch):
    def change(tensors):
        del tensors["text_model.final_layer_norm.bias"]

    shapes = _edit(tmp_path, change)
    read = []
    tensors = formats.tensors
    monkeypatch.setattr(
        formats,
        "tensors",
        lambda path: {k: t._replace(read=lambda k=k: read.append(k)) for k, t in tensors(path).items()},
    )
    with pytest.raises(WeightsError, match="1 tensor missing"):
        weights.load(tmp_path, shapes)
    assert not read


def test_progress_counts_the_bytes(tmp_path):
    shapes, params, config = component("text_encoder")
    weights.save(tmp_path, params, config)
    calls = []
    weights.load(
        tmp_path, shapes, dtype=jnp.float16, progress=lambda done, total: calls.append((done, total))
    )
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert calls[-1] == (size, size)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


_SHARDED_LOAD = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from megjax import weights
folder = {folder!r}
params = {{"linear_1": {{"kernel": np.arange(48.0, dtype="f").reshape(8, 6), "bias": np.ones(6, "f")}}}}
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
weights.save(folder, params, {{"_class_name": "Any"}})
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
each = {{"linear_1": {{"kernel": split, "bias": whole}}}}
loaded = weights.load(folder, shapes, shardings=each)["linear_1"]
assert loaded["kernel"].sharding == split and loaded["bias"].sharding == whole
assert [s.data.shape for s in loaded["kernel"].addressable_shards] == [(2, 6)] * 4
assert all((loaded[k] == params["linear_1"][k]).all() for k in loaded)
assert weights.load(folder, shapes, shardings=whole)["linear_1"]["kernel"].sharding == whole
try:
    weights.load(folder, shapes, shardings={{"linear_1": {{"kernel": split}}}})
except weights.reading.WeightsError as error:
    assert "shardings: none for linear_1/bias" in str(error)
else:
    raise SystemExit("a lacking sharding went unseen")
"""


def _python(code: str, **env: str) -> str:
    """Run code in a process of its own: devices and peak memory belong to a process."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_leaves_go_to_their_shardings(tmp_path):
    code = _SHARDED_LOAD.format(folder=str(tmp_path))
    _python(code, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")


_PEAK = """
import pathlib, re, jax, numpy as np
from megjax import weights
leaf = jax.ShapeDtypeStruct((1024, 1024), np.float32)
shapes = {{"transformer_blocks": {{str(i): {{"to_q": {{"kernel": leaf}}}} for i in range({leaves})}}}}
jax.device_put(np.zeros(3)).block_until_ready()
# Not `getrusage`: its peak is inherited from the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
params = weights.load({folder!r}, shapes)
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("format", FORMATS)
def test_host_memory_holds_one_copy(tmp_path, format):
    leaves = 32
    block = {"to_q": {"kernel": np.ones((1024, 1024), np.float32)}}
    params = {"transformer_blocks": {str(i): block for i in range(leaves)}}
    weights.save(tmp_path, params, {"_class_name": "Any"}, format=format)
    peak = int(_python(_PEAK.format(folder=str(tmp_path), leaves=leaves), JAX_PLATFORMS="cpu"))
    assert peak <= 1.3 * leaves * 4 * 1024**2
    assert peak >= 0.9 * leaves * 4 * 1024**2  # the weights themselves were measured
