"""Saving: other files stay, old shards go, and a save that fails leaves what was there."""

import json
import os
import stat

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from megjax import weights
from megjax.errors import MegError, WeightsError
from megjax.weights import writing
from tests.weights.weight_trees import component, same

SHARDS = 30_000


def weight_files(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(("model-", "model.")))


@pytest.mark.parametrize("format", ["safetensors", "msgpack"])
def test_a_save_replaces_the_one_before(tmp_path, format):
    shapes, params, config = component("text_encoder")
    for name in ("model_index.json", "README.md", "model.fp16.safetensors.txt"):
        (tmp_path / name).write_text("mine")
    for seed, limit in enumerate([None, SHARDS, 3 * SHARDS, 10**9, SHARDS, 2]):
        params = component("text_encoder", seed=seed).params
        weights.save(tmp_path, params, config, format=format, max_shard_bytes=limit)
        assert same(weights.load(tmp_path, shapes), params)
        found = [p.name for p in tmp_path.glob(f"*.{format}")]
        index = list(tmp_path.glob("*.index.json"))
        named = set(json.loads(index[0].read_text())["weight_map"].values()) if index else set(found[:1])
        assert set(found) == named
        assert not list(tmp_path.glob(".saving*"))
    assert (tmp_path / "model_index.json").read_text() == "mine"
    assert (tmp_path / "README.md").exists()
    assert (tmp_path / "model.fp16.safetensors.txt").exists()


@pytest.mark.parametrize("format", ["safetensors", "msgpack"])
def test_weights_are_readable_by_others(tmp_path, format):
    _, params, config = component("text_encoder")
    umask = os.umask(0o022)
    try:
        weights.save(tmp_path, params, config, format=format, max_shard_bytes=SHARDS)
    finally:
        os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("limit", [2, SHARDS, 10**9])
def test_shards_keep_to_their_size(tmp_path, limit):
    _, params, config = component("text_encoder")
    weights.save(tmp_path, params, config, max_shard_bytes=limit)
    total = 0
    for file in tmp_path.glob("*.safetensors"):
        tensors = safetensors.numpy.load_file(file)
        size = sum(x.nbytes for x in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
    if limit < 10**9:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == total


def test_a_failed_save_leaves_the_one_before(tmp_path, monkeypatch):
    shapes, params, config = component("text_encoder")
    weights.save(tmp_path, params, config, max_shard_bytes=SHARDS)
    before = sorted(os.listdir(tmp_path))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save(tmp_path, component("text_encoder", seed=1).params, config)
    assert sorted(os.listdir(tmp_path)) == before
    assert same(weights.load(tmp_path, shapes), params)


@pytest.mark.parametrize(
    ("before", "after"), [(None, None), (None, SHARDS), (SHARDS, None), (SHARDS, SHARDS)]
)
def test_an_interrupted_save_never_mixes_two_models(tmp_path, monkeypatch, before, after):
    """Stop at each of the steps that change the folder: what loads then is all old or all new."""
    shapes, _, config = component("text_encoder")
    old, new = (component("text_encoder", seed=seed).params for seed in (1, 2))
    replace = os.replace
    for steps in range(20):
        folder = tmp_path / str(steps)
        weights.save(folder, old, config, max_shard_bytes=before)
        left = iter(range(steps))

        def interrupted(*args, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            try:
                weights.save(folder, new, config, max_shard_bytes=after)
            except KeyboardInterrupt:
                done = False
            else:
                done = True
        try:
            loaded = weights.load(folder, shapes)
        except WeightsError:
            assert not done
            assert after is not None  # a whole file replaces its predecessor in one step
        else:
            assert same(loaded, new if done else old) or same(loaded, new)
        if done:
            assert steps > 0, "it changed the folder in no step that could be stopped"
            return
    pytest.fail("the save never ended")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"hidden_size": 3}}, "neither _class_name"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: 0; must be at least 1"),
        (
            {"params": {"a": {"kernel": np.zeros((2, 2), np.int32)}}},
            "a/kernel is int32; allowed: float32, float16",
        ),
    ],
)
def test_bad_arguments(tmp_path, change, said):
    arguments = {
        "params": {"a": {"bias": np.zeros(2, np.float32)}},
        "config": {"_class_name": "Any"},
    } | change
    with pytest.raises(MegError, match=said):
        weights.save(tmp_path / "new", **arguments)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_formats_are_not_mixed(tmp_path):
    _, params, config = component("text_encoder", jnp.bfloat16)
    weights.save(tmp_path, params, config)
    with pytest.raises(WeightsError, match=r"model\.safetensors: the folder holds weights in another format"):
        weights.save(tmp_path, params, config, format="msgpack")
    assert weight_files(tmp_path) == ["model.safetensors"]
