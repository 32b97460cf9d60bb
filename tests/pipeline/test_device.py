"""The exported device: run where there is no MegJAX, at several ratios with one artifact."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax import merging
from megjax.cli import main
from megjax.errors import MegError
from megjax.link import wire
from megjax.merging import carried, pack, unpack
from megjax.models import Options
from megjax.pipeline import load_pipeline
from megjax.pipeline.device import Device, load_device, picture_mse, receiver
from megjax.pipeline.int8 import Quantised, quantised
from tests.small import save_random

RATIOS = (0.0, 0.3, 0.9)

RUN = """
import sys
import jax, numpy as np
with open("decoder.stablehlo", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
messages = np.load("messages.npz")
names = {name.split("/")[1] for name in messages}
pictures = [program.call({n: messages[f"{i}/{n}"] for n in names}) for i in range(3)]
np.save("pictures.npy", np.stack(pictures))
assert not any(name.split(".")[0] in ("megjax", "flax") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("backbone") / "model")


def message(ratio):
    z = jax.random.normal(jax.random.key(0), (16, 16, 4))
    tokens, key = merging.to_tokens(z), jax.random.key(1)
    plan = merging.match(tokens, key, ratio, (8, 8))
    return pack(merging.merge(tokens, plan), plan, key, ratio, (8, 8))


def test_one_artifact_decodes_every_ratio_without_megjax(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(sys, "argv", ["megjax", "export-ue", "--model", str(folder)])
    main()
    assert "features: float32[64, 16]" in capsys.readouterr().out
    messages = [message(ratio) for ratio in RATIOS]
    arrays = [carried(wire.decode(m)) for m in messages]
    np.savez("messages.npz", **{f"{i}/{n}": v for i, a in enumerate(arrays) for n, v in a.items()})
    # From a folder where no megjax lies, with a path that does not lead to one.
    run = subprocess.run(
        [sys.executable, "-P", "-c", RUN], env={"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    device = load_device(folder)
    for picture, sent in zip(np.load("pictures.npy"), messages, strict=True):
        received = unpack(sent)
        tokens = merging.unmerge(received.merged_NxD, received.plan)
        z = merging.from_tokens(tokens[None], (8, 8), "patch")
        expected = jnp.clip(device.decoder(device.params, z)[0], 0, 1)
        assert np.std(expected) > 1e-3
        np.testing.assert_allclose(picture, expected, atol=2e-5)


def test_messages_of_one_round_fill_the_second_with_zeros():
    content = carried(wire.decode(message(0.3)))
    assert content["features"].shape == (64, 16)
    assert content["merged_1"].sum() == 19
    assert not content["merged_2"].any()
    # Rows after the last are zeros.
    assert not content["features"][45:].any()
    assert content["features"][44].any()


def test_the_decoder_that_is_asked_for(folder):
    tiny = load_device("tiny", Options())
    vae = load_device("tiny", Options(), decoder="vae")
    assert isinstance(tiny, Device)
    assert tiny.size == (64, 64)
    params = load_pipeline("tiny").params
    chex.assert_trees_all_equal(tiny.params, params["decoders"]["meg"])
    chex.assert_trees_all_equal(vae.params, params["vae_decoder"])
    assert callable(receiver(vae))
    with pytest.raises(MegError, match="decoder 'other'"):
        load_device(folder, decoder="other")
    with pytest.raises(MegError, match="multiples of 8"):
        load_device(folder, size=(60, 64))


def test_int8_weights_are_a_quarter_and_their_pictures_nearly_the_same(tmp_path, monkeypatch, capsys):
    pytest.importorskip("qwix")
    device = load_device("tiny")
    rounded = device._replace(params=quantised(device.params))
    kernels = jax.tree.leaves(rounded.params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    kernels = [leaf for leaf in kernels if isinstance(leaf, Quantised)]
    assert len(kernels) > 20
    flat = jax.tree.leaves_with_path(device.params)
    originals = [leaf for path, leaf in flat if path[-1].key == "kernel"]
    for kernel, original in zip(kernels, originals, strict=True):
        assert kernel.value.dtype == jnp.int8
        # To the nearest of 255 levels, in each output channel its own.
        largest = np.abs(original).max(tuple(range(original.ndim - 1)))
        error = np.abs(np.asarray(kernel.value * kernel.scale) - original)
        assert np.all(error <= largest / 127 * 0.5 * (1 + 1e-4))
    mse = picture_mse(device, rounded)
    assert 0 < mse < 1e-4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[").mkdir()
    # A name that would be markup is printed as it is.
    files = {name: f"[/{name}].stablehlo" for name in ("same", "int8")}
    for name, file in files.items():
        args = ["megjax", "export-ue", "-o", file, "--weights", name, "--platforms", "cpu"]
        monkeypatch.setattr(sys, "argv", args)
        main()
    out = capsys.readouterr().out
    assert f"an MSE of {mse:.2e}" in out
    assert all(f"{file}: " in out for file in files.values())
    sizes = {name: (tmp_path / file).stat().st_size for name, file in files.items()}
    assert sizes["int8"] < 0.35 * sizes["same"]
    content = carried(wire.decode(message(0.3)))
    program = jax.export.deserialize(bytearray((tmp_path / files["int8"]).read_bytes()))
    expected = receiver(rounded)(jax.tree.map(jnp.asarray, content))
    np.testing.assert_allclose(program.call(content), expected, atol=2e-5)
