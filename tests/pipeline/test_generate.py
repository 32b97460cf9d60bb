"""A prompt through the split, on an untrained backbone: what all pictures have in common, and bad input."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.data.render import render
from megjax.data.scenes import sample_scenes
from megjax.diffusion import Flow, conditioned, perflow
from megjax.diffusion.perflow import flow_file
from megjax.errors import MegError, WeightsError
from megjax.link import profiles, wire
from megjax.merging import match, merge, pack
from megjax.models import VAEConfig
from megjax.pipeline import Request, generate, generate_each, load_pipeline
from megjax.pipeline.split import (
    condition,
    decode,
    denoise,
    encode,
    noise_unit,
    send,
    steps_run,
    unet_params,
)
from megjax.pipeline.workload import workload
from megjax.text import tokenize
from tests.small import save_random

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("backbone") / "model")


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder)


def test_nothing_merged_and_a_perfect_channel_is_the_reference(pipeline):
    out = generate(pipeline, Request(PROMPT, steps=12, ratio=0.0, psnr_db=math.inf))
    # All that is left between both is the rounding of the features to 16 bits.
    assert out.mse < 1e-6
    assert out.image_HxWx3.shape == (64, 64, 3)
    assert 0 <= out.image_HxWx3.min() <= out.image_HxWx3.max() <= 1


def test_same_seed_same_picture(pipeline):
    first, again = (generate(pipeline, Request(PROMPT, seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first.image_HxWx3, again.image_HxWx3)
    other = generate(pipeline, Request(PROMPT, seed=4))
    assert not np.array_equal(first.image_HxWx3, other.image_HxWx3)


def test_many_requests_share_a_reference_and_their_latents(pipeline):
    stages = []
    requests = [Request(PROMPT, steps=t, ratio=r) for t in (4, 12) for r in (0.0, 0.4)]
    for request, out in zip(requests, generate_each(pipeline, requests, on_stage=stages.append), strict=True):
        alone = generate(pipeline, request)
        np.testing.assert_array_equal(out.image_HxWx3, alone.image_HxWx3)
        assert out[2:] == alone[2:]
    assert [s for s in stages if s.startswith("U-Net")] == ["U-Net, 12 steps", "U-Net, 4 steps"]
    with pytest.raises(MegError, match="generate others apart"):
        next(generate_each(pipeline, [Request(PROMPT), Request(PROMPT, seed=1)]))


def test_a_picture_that_is_not_finite_is_refused(pipeline):
    params = pipeline.params | {
        "vae_decoder": jax.tree.map(lambda p: p * 1e30, pipeline.params["vae_decoder"])
    }
    with pytest.raises(MegError, match="not finite"):
        generate(dataclasses.replace(pipeline, params=params), Request(PROMPT, steps=1))


@pytest.mark.parametrize("rules", ["default", "paper"])
def test_payload_is_what_is_sent(pipeline, rules):
    key, grid = jax.random.key(0), (8, 8)
    tokens = jax.random.normal(key, (64, 16))
    for ratio in (0.0, 0.4, 0.75):
        out = generate(pipeline, Request(PROMPT, steps=1, ratio=ratio, rules=rules))
        merged = int(np.floor(np.float32(ratio) * 64 + 1e-4))
        assert out.tokens == 64 - merged
        if rules == "default":
            plan = match(tokens, key, ratio, grid)
            message = pack(merge(tokens, plan), plan, key, ratio, grid)
            assert out.payload_bits == 8 * (len(message) - wire.HEADER_BYTES)
        else:  # a 16-bit symbol tells where a merged token went
            assert out.payload_bits == 16 * (16 * (64 - merged) + merged)


@pytest.mark.parametrize(("rules", "snr_db"), [("default", 20.0), ("paper", 37.7)])
def test_noise_of_20_db_is_what_the_rules_say(rules, snr_db):
    """Under the authors' rules 0.1 on un-normalised latents: near 38 dB of SDXL's, which have 7.7."""
    vae = VAEConfig()
    z = jax.random.normal(jax.random.key(0), (1, 64, 64, 4))
    received = send(jax.random.key(1), z, 0.0, 20.0, rules=rules, unit=noise_unit(rules, vae))
    error = np.asarray(received.z_BxHxWxC - z)
    assert -10 * np.log10(np.var(error)) == pytest.approx(snr_db, abs=0.2)
    with pytest.raises(MegError, match="noise_unit"):
        send(jax.random.key(1), z, 0.0, 20.0, rules=rules, unit=None if rules == "paper" else (1.0,) * 4)


def test_noise_is_in_units_of_each_channel():
    vae = VAEConfig(scaling_factor=1.0, latents_mean=(0.0,) * 4, latents_std=(1.0, 2.0, 4.0, 8.0))
    z = jax.random.normal(jax.random.key(0), (1, 64, 64, 4))
    received = send(jax.random.key(1), z, 0.0, 20.0, rules="paper", unit=noise_unit("paper", vae))
    std_C = np.std(np.asarray(received.z_BxHxWxC - z), axis=(0, 1, 2))
    np.testing.assert_allclose(std_C * vae.latents_std, 0.1, rtol=0.05)


def test_one_executable_for_all_steps_ratios_and_noise_levels(pipeline):
    ids = tokenize(pipeline.tokenizers, [PROMPT])
    prompt = condition(pipeline, pipeline.params, jnp.asarray(ids), size=(64, 64))
    noise = jnp.zeros((1, 16, 16, 4))
    before = denoise._cache_size(), send._cache_size()
    for steps, ratio in ((4, 0.1), (6, 0.5), (12, 0.8)):
        z = denoise(pipeline, pipeline.params["unet"], noise, prompt, prompt, steps, 2.5, noise, 1.0)
        send(jax.random.key(0), z, ratio, 10.0 * ratio)
    after = denoise._cache_size(), send._cache_size()
    assert max(b - a for a, b in zip(before, after, strict=True)) <= 1


def test_image_to_image_keeps_more_at_low_strength():
    """Of a trained backbone: an untrained one keeps nothing."""
    pipeline = load_pipeline("tiny")
    scene = np.asarray(render(sample_scenes(jax.random.key(3), 1), 64)[0])
    kept = encode(pipeline, pipeline.params["vae_encoder"], jnp.asarray(scene)[None])
    shown = decode(pipeline, pipeline.params["vae_decoder"], kept)[0]
    distances = [
        float(jnp.mean(jnp.square(out.reference_HxWx3 - shown)))
        for s in (0.1, 0.5, 1.0)
        for out in [generate(pipeline, Request(PROMPT, strength=s, ratio=0.0, psnr_db=math.inf), scene)]
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.3 * distances[-1]


def test_steps_from_a_picture():
    shares = [(12, 1.0, 12), (12, 0.5, 6), (10, 0.3, 3), (12, 0.01, 1), (7, 0.5, 3)]
    for steps, strength, run in shares:
        assert int(steps_run(steps, strength)) == run


def test_workload_counts_this_backbone(pipeline):
    work = workload(pipeline, (64, 64))
    smaller = workload(pipeline, (32, 32))
    assert 0 < work.text_encoder_flops < work.vae_decoder_flops
    # Convolutions and dense layers grow with the pixels, attention with their square.
    assert 3.5 < work.vae_decoder_flops / smaller.vae_decoder_flops < 6
    assert work.text_encoder_flops == smaller.text_encoder_flops


def test_guidance_1_is_one_call_a_step(pipeline):
    """The empty prompt is not read, and the picture is what both branches give at that guidance."""
    plain = Request(PROMPT, steps=4, guidance=1.0)
    one, both, other = (
        generate(pipeline, dataclasses.replace(plain, **change)).reference_HxWx3
        for change in ({}, {"guidance": 1.0 + 1e-7}, {"negative_prompt": "a blue square"})
    )
    np.testing.assert_allclose(one, both, atol=1e-4)
    np.testing.assert_array_equal(one, other)
    steps = [profiles.compute(profiles.load("paper"), workload(pipeline, (64, 64), 0.0, n)) for n in (1, 2)]
    assert float(steps[1].es_step_s) == pytest.approx(2 * float(steps[0].es_step_s))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"ratio": 1.2}, "from 0 to 0.9375"),
        ({"ratio": math.nan}, "from 0 to 0.9375"),
        ({"psnr_db": math.nan}, "perfect channel"),
        ({"guidance": -1.0}, "from 0 on"),
        ({"sampler": "perflow"}, "has no few-step student; take ddim"),
        ({"strength": 0.0}, "above 0"),
        ({"seed": -1}, "seed"),
        ({"height": 65}, "multiples of 8"),
        ({"height": 8}, "1 x 8 tokens, two rounds at most 0"),
        ({"prompt": ""}, "empty"),
        ({"prompt": "red " * 200}, "30 at most"),
    ],
)
def test_bad_requests(pipeline, change, message):
    with pytest.raises(MegError, match=message):
        generate(pipeline, dataclasses.replace(Request(PROMPT), **change))


def test_picture_of_another_size_is_refused(pipeline):
    with pytest.raises(MegError, match="resize"):
        generate(pipeline, Request(PROMPT), np.zeros((32, 64, 3), np.float32))


@pytest.mark.parametrize("value", [np.float32(np.nan), np.float32(1.5)])
def test_what_is_no_picture_is_refused(pipeline, value):
    with pytest.raises(MegError, match="give numbers from 0 to 1"):
        generate(pipeline, Request(PROMPT), np.full((64, 64, 3), value))


def test_a_part_of_a_step_is_refused(pipeline):
    request = Request(PROMPT)
    object.__setattr__(request, "steps", 4.7)  # past the types that tests check
    with pytest.raises(MegError, match="whole number"):
        generate(pipeline, request)


def test_no_request_at_all_is_refused(pipeline):
    with pytest.raises(MegError, match="at least one"):
        next(generate_each(pipeline, []))


def test_a_student_is_sampled_as_it_was_distilled(folder, tmp_path):
    """Its flow is told by a file beside its weights; one without it follows the paper's."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    shutil.copytree(model / "unet", model / "unet_student")
    assert load_pipeline(model).flow == Flow("ddim_eps", 4)
    for flow in (Flow("velocity", 2), Flow("ddim_eps", 4)):
        (model / "unet_student" / "flow.json").write_bytes(flow_file(flow)["flow.json"])
        distilled = load_pipeline(model)
        ids = jnp.asarray(tokenize(distilled.tokenizers, [PROMPT]))
        prompt = condition(distilled, distilled.params, ids, size=(64, 64))
        noise = jax.random.normal(jax.random.key(0), (1, 16, 16, 4))
        params, sampler = unet_params(distilled)
        z = denoise(distilled, params, noise, prompt, None, 6, 1.0, noise, 1.0, sampler=sampler)
        student = conditioned(distilled.unet, params, prompt)
        expected = perflow(student, noise, distilled.schedule, 6, kind=flow.kind, windows=flow.windows)
        np.testing.assert_allclose(z, expected, atol=1e-4)
        with pytest.raises(MegError, match=f"from {flow.windows} to"):
            generate(distilled, Request(PROMPT, steps=flow.windows - 1))
    (model / "unet_student" / "flow.json").write_bytes(flow_file(Flow(windows=13))["flow.json"])
    with pytest.raises(MegError, match="13 windows, and the reference is of 12 steps"):
        generate(load_pipeline(model), Request(PROMPT, steps=13))
    for wrong in ('{"kind": "x0"}', '{"windows": 0}', "[]", '{"speed": 1}'):
        (model / "unet_student" / "flow.json").write_text(wrong)
        with pytest.raises(WeightsError, match="flow"):
            load_pipeline(model)


def test_folders_that_do_not_fit_together(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    path = broken / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"cross_attention_dim": 48}))
    with pytest.raises(WeightsError, match="do not fit a U-Net"):
        load_pipeline(broken)
    path.write_text(json.dumps(config))
    (broken / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(WeightsError, match="scheduler"):
        load_pipeline(broken)


@pytest.mark.parity
def test_pytorch_diffusers_loads_what_is_saved(folder, pipeline):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    out = theirs(PROMPT, num_inference_steps=4, guidance_scale=2.5, height=64, width=64, output_type="np")
    assert out.images.shape == (1, 64, 64, 3)
    assert np.isfinite(out.images).all()
