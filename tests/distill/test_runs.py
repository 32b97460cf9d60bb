"""Whole runs on an untrained backbone: they resume, and end in a folder that generates."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import distill_decoder, distill_diffuser
from megjax.distill.decoder_run import load_decoder, train_decoder
from megjax.distill.diffuser import train_diffuser
from megjax.distill.export import add_delta
from megjax.errors import MegError
from megjax.pipeline import Request, generate, load_pipeline
from megjax.weights import load
from tests.small import save_random

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("backbone") / "model")


def presets(module, folder, backbone, **fields):
    given = {"model": str(backbone), "folder": folder, "cache": folder.parent / "cache", **fields}
    names = ("debug", "debug-resume")
    return [dataclasses.replace(module.PRESETS[name][1], **given) for name in names]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_rank": 2, "accumulate": 2},
        {"optimizer": "muon", "moments": "bfloat16"},
        {"offload_ema": True, "optimizer": "adafactor", "kind": "velocity", "windows": 2},
    ],
)
def test_a_student_is_distilled_resumed_and_used(tmp_path, backbone, fields):
    first, resumed = presets(distill_diffuser, tmp_path / "run", backbone, **fields)
    train_diffuser(first)
    model = train_diffuser(resumed)
    _, whole = presets(distill_diffuser, tmp_path / "whole", backbone, **fields)
    pipelines = load_pipeline(model), load_pipeline(train_diffuser(whole))
    jax.tree.map(np.testing.assert_array_equal, *(pipeline.params["student"] for pipeline in pipelines))
    lines = [json.loads(line) for line in (tmp_path / "run" / "student.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    evaluations = [line for line in lines if "consistency" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    for line in evaluations:
        # Other examples, the same measure.
        assert np.isfinite([line["consistency"], line["learned_consistency"]]).all()
        assert line["consistency"] != line["learned_consistency"]
    pipeline = pipelines[0]
    assert pipeline.flow == (first.kind, first.windows)
    change = load(tmp_path / "run" / "unet_delta", pipeline.unet.shapes)
    again = add_delta(pipeline.params["unet"], change)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(pipeline.params["student"]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(np.abs(b).max()))
    assert np.isfinite(generate(pipeline, Request("a red circle", steps=4)).image_HxWx3).all()


def test_a_student_starts_from_another(tmp_path, backbone):
    fields = {"solve_once": True, "window_draws": (2, 1, 1, 1), "start_share": 0.5, "pure_noise": True}
    fields |= {"chained": True, "rollout": 1.0}
    first, _ = presets(distill_diffuser, tmp_path / "run", backbone, **fields)
    trained = load_pipeline(train_diffuser(first))
    on = dataclasses.replace(
        first, folder=tmp_path / "on", start=first.folder / "unet_student", learning_rate=0.0
    )
    same = load_pipeline(train_diffuser(on))
    jax.tree.map(np.testing.assert_array_equal, same.params["student"], trained.params["student"])
    with pytest.raises(MegError, match="are of kind ddim_eps, this run is of velocity"):
        train_diffuser(dataclasses.replace(first, kind="velocity"))
    with pytest.raises(
        MegError, match="a student of --kind ddim_eps --windows 4, this run is of ddim_eps, 2"
    ):
        train_diffuser(dataclasses.replace(on, folder=tmp_path / "other", windows=2, window_draws=(1, 1)))
    with pytest.raises(MegError, match="factors start from the teacher"):
        train_diffuser(dataclasses.replace(on, folder=tmp_path / "lora", lora_rank=2))


@pytest.mark.parametrize("method", ["meg", "pruning"])
def test_a_decoder_is_distilled_resumed_and_read(tmp_path, backbone, method):
    fields = {"method": method, "width": 0.5 if method == "meg" else 1.0}
    first, resumed = presets(distill_decoder, tmp_path / "run", backbone, **fields)
    train_decoder(first)
    folder = train_decoder(resumed)
    decoder, params, gate = load_decoder(folder)
    assert (gate is not None) == (method == "pruning")
    on = dataclasses.replace(first, folder=tmp_path / "on", start=folder, learning_rate=0.0)
    _, same, _ = load_decoder(train_decoder(on))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), same, params)
    picture = np.asarray(decoder(params, jnp.zeros((1, 16, 16, 4))))
    assert picture.shape == (1, 64, 64, 3)
    assert np.isfinite(picture).all()
