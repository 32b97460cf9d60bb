"""The trainers' programs, traced but not compiled: dtypes, factors, parts; and every preset."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import distill_decoder, distill_diffuser
from megjax import flops
from megjax.distill import diffuser
from megjax.distill.cache import Block, cached
from megjax.distill.decoder_run import DecoderConfig, decoder_distillation, narrowed, train_decoder
from megjax.distill.diffuser import DiffuserConfig, distillation, train_diffuser
from megjax.distill.encoding import STEPS
from megjax.errors import MegError
from megjax.models import Options, VAEConfig, unet, vae_decoder
from megjax.pipeline import load_pipeline
from megjax.training.step import Inputs


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny")


def shape(*axes, dtype=jnp.float16):
    return jax.ShapeDtypeStruct(axes, dtype)


def rows(B):
    return {"z0": shape(B, 16, 16, 4), "text": shape(B, 32, 128), "pooled": shape(B, 64)}


@pytest.mark.parametrize(
    "fields",
    [{}, {"lora_rank": 4, "accumulate": 2}, {"dtype": "bfloat16", "remat": True, "kind": "velocity"}],
)
def test_the_students_weights_are_in_float32_whatever_computes(pipeline, fields):
    config = DiffuserConfig(solver_steps=2, **fields)
    program = distillation(config, pipeline)
    sizes = jax.tree.map(lambda leaf: leaf.size, program.state.params)
    whole = sum(leaf.size for leaf in jax.tree.leaves(pipeline.params["unet"]))
    trained = sum(jax.tree.leaves(sizes))
    assert trained < whole / 2 if config.lora_rank else trained == whole
    assert {leaf.dtype for leaf in jax.tree.leaves(program.state.params)} == {jnp.dtype("float32")}
    teacher = jax.tree.map(lambda p: shape(*p.shape, dtype=config.dtype), pipeline.unet.shapes)
    frozen = {"teacher": teacher, "empty": (shape(1, 32, 128), shape(1, 64))}
    state, metrics = jax.eval_shape(program.step, program.state, jax.random.key(0), Inputs(rows(4), frozen))
    assert state == program.state
    assert {"loss", "grad_norm", "skipped", "window_0", "window_3"} <= metrics.keys()
    student = jax.eval_shape(program.student, program.state.ema, teacher)
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(jnp.shape, teacher)
    # Exported from the teacher in float32, whose own dtype would round small changes away.
    exported = jax.eval_shape(program.student, program.state.ema, pipeline.unet.shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(exported)} == {jnp.dtype("float32")}


def test_a_kernel_that_cannot_be_lowered_here_is_counted_by_its_model(pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    config = DiffuserConfig(attention="cudnn", dtype="bfloat16", batch=4, peak_flops_per_s=1e12)
    kernels = Options("bfloat16", "bfloat16", attention="cudnn")
    pipeline = dataclasses.replace(pipeline, unet=unet(pipeline.unet.config, kernels))
    teacher = jax.tree.map(lambda p: shape(*p.shape, dtype=config.dtype), pipeline.unet.shapes)
    frozen = {"teacher": teacher, "empty": (shape(1, 32, 128), shape(1, 64))}
    one = Block({k: np.zeros(v.shape, v.dtype) for k, v in rows(1).items()})
    data = cached(tmp_path, {}, 1, lambda start, stop: one)
    assert diffuser._work(config, pipeline, frozen, data).flops > 0


def test_what_is_loaded_whole_is_released_before_training(monkeypatch, tmp_path):
    tiny = load_pipeline("tiny")
    whole = Block({k: np.zeros((16, *v.shape[1:]), v.dtype) for k, v in rows(1).items()})

    def fit(*args, **options):
        assert set(tiny.params) == {"vae_decoder"}
        raise InterruptedError

    monkeypatch.setattr(diffuser, "load_pipeline", lambda *_: tiny)
    monkeypatch.setattr(diffuser, "encoded_pictures", lambda *_: cached(tmp_path, {}, 16, lambda *_: whole))
    monkeypatch.setattr(diffuser, "fit", fit)
    config = distill_diffuser.PRESETS["debug"][1]
    with pytest.raises(InterruptedError):
        train_diffuser(dataclasses.replace(config, folder=tmp_path / "run"))


def test_a_whole_way_needs_chained_windows(pipeline):
    config = DiffuserConfig(solve_once=True, chained=True, rollout=1.0, window_draws=(2, 2, 1, 1))
    program = distillation(config, pipeline)
    teacher = jax.tree.map(lambda p: shape(*p.shape, dtype="float32"), pipeline.unet.shapes)
    frozen = {"teacher": teacher, "empty": (shape(1, 32, 128), shape(1, 64))}
    data = rows(2) | {name: shape(2, 6, 16, 16, 4) for name in ("z_s", "z_e")}
    _, metrics = jax.eval_shape(program.step, program.state, jax.random.key(0), Inputs(data, frozen))
    assert "rollout" in metrics
    with pytest.raises(MegError, match="add --chained"):
        distillation(dataclasses.replace(config, chained=False), pipeline)
    with pytest.raises(MegError, match="above 0 is allowed"):
        distillation(dataclasses.replace(config, rollout_width=0.0), pipeline)
    with pytest.raises(MegError, match="add --solve-once"):
        distillation(dataclasses.replace(config, solve_once=False), pipeline)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch 0: at least 1 is allowed"),
        ({"held_out": 0}, "held_out 0: at least 1"),
        ({"solver_steps": 0}, "solver_steps 0: 1 to 250 is allowed"),
        ({"solver_steps": 251}, "solver_steps 251: 1 to 250 is allowed"),
        ({"text_drop": 3.0}, "text_drop 3.0: 0 to 1 is allowed"),
        ({"ema_decay": 2.0}, "ema_decay 2.0: 0 to 1"),
        ({"learning_rate": -1.0}, "learning_rate -1.0: at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate nan: at least 0"),
        ({"huber": 0.0}, "huber 0.0: above 0"),
        ({"dtype": "float15"}, "dtype float15: choose from float32, bfloat16, float16"),
        ({"attention": "foo"}, "attention foo: choose from"),
        ({"optimizer": "muon", "lora_rank": 8}, "lora_rank 8 with muon"),
        ({"window_draws": (1, 2)}, "window_draws (1, 2): one number"),
        ({"window_draws": (1, 2, 1, 1), "solve_once": True, "chained": True}, "no window can have more"),
    ],
)
def test_settings_that_cannot_be_trained_with(pipeline, fields, message):
    with pytest.raises(MegError, match=re.escape(message)):
        distillation(DiffuserConfig(**fields), pipeline)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_batch": 0}, "sample_batch 0: at least 1 is allowed"),
        ({"ratios": (-2.0, -1.0)}, "ratios (-2.0, -1.0): 0 to 1 is allowed"),
        ({"ratios": (0.5, 0.1)}, "ratios 0.5 0.1: give the lower end first"),
        ({"test_ratios": (1.5,)}, "test_ratios (1.5,): 0 to 1 is allowed"),
        ({"psnr_db": (float("nan"), 20.0)}, "psnr_db (nan, 20.0): -100 to 300 is allowed"),
        ({"clip": 0.0}, "clip 0.0: above 0 is allowed"),
        ({"accumulate": 0}, "accumulate 0: at least 1"),
    ],
)
def test_settings_that_no_decoder_can_be_trained_with(fields, message):
    with pytest.raises(MegError, match=re.escape(message)):
        train_decoder(DecoderConfig(**fields))


@pytest.mark.parametrize("method", ["meg", "split_finetune", "pruning", "magnitude_pruning"])
def test_decoders_programs(pipeline, method):
    config = DecoderConfig(method=method, batch=4, accumulate=2, width=0.5)
    program = decoder_distillation(config, pipeline)
    assert ("gate" in program.state.params) == (method == "pruning")
    data = {"z": shape(4, len(STEPS), 16, 16, 4), "picture": shape(4, 64, 64, 3, dtype=jnp.uint8)}
    state, metrics = jax.eval_shape(program.step, program.state, jax.random.key(0), data)
    assert state == program.state
    assert "mse" in metrics


def test_a_narrow_decoder_keeps_its_norms_groups_and_costs_a_tenth():
    assert narrowed(VAEConfig(), 1.0) == VAEConfig()
    assert narrowed(VAEConfig(), 0.3).block_out_channels == (32, 64, 160, 160)
    assert narrowed(VAEConfig(), 0.01).block_out_channels == (32, 32, 32, 32)
    z = shape(1, 128, 128, 4, dtype=jnp.float32)
    whole, narrow = (vae_decoder(narrowed(VAEConfig(), width)) for width in (1.0, 0.3))
    assert flops.count(narrow, narrow.shapes, z).flops < 0.1 * flops.count(whole, whole.shapes, z).flops
    with pytest.raises(MegError, match=r"width 1\.5"):
        narrowed(VAEConfig(), 1.5)


def test_presets_fit_together():
    for name, (_, config) in {**distill_diffuser.PRESETS, **distill_decoder.PRESETS}.items():
        assert config.batch % config.accumulate == 0, name
        assert config.evaluate_every % config.checkpoint_every == 0, name
        assert config.data.pictures >= config.held_out + config.batch, name
    resumed = distill_diffuser.PRESETS["debug-resume"][1]
    assert dataclasses.replace(resumed, steps=2) == distill_diffuser.PRESETS["debug"][1]


@pytest.mark.parametrize(
    ("train", "module"), [(train_diffuser, distill_diffuser), (train_decoder, distill_decoder)]
)
def test_a_start_or_a_folder_that_is_not_there_is_found_before_any_data_is_read(tmp_path, train, module):
    debug = dataclasses.replace(module.DEBUG, cache=tmp_path / "cache", folder=tmp_path / "run")
    with pytest.raises(MegError, match="nope"):
        train(dataclasses.replace(debug, start=tmp_path / "nope"))
    (tmp_path / "file").touch()
    with pytest.raises(MegError, match="cannot be written"):
        train(dataclasses.replace(debug, folder=tmp_path / "file" / "run"))
    assert not (tmp_path / "cache").exists()
