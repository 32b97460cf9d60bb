"""A prompt through the split, on an untrained backbone: what all pictures have in common, and bad input."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.errors import MegError, WeightsError
from megjax.link.payload import payload_bits
from megjax.pipeline import Request, generate, generate_each, load_pipeline
from megjax.pipeline.split import condition, denoise, send
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
    for ratio in (0.0, 0.4, 0.75):
        out = generate(pipeline, Request(PROMPT, steps=1, ratio=ratio, rules=rules))
        assert out.tokens == 64 - int(np.floor(np.float32(ratio) * 64 + 1e-4))
        assert out.payload_bits == payload_bits(ratio, 64, 16, rules=rules)


def test_one_executable_for_all_steps_ratios_and_noise_levels(pipeline):
    ids = tokenize(pipeline.tokenizers, [PROMPT])
    prompt = condition(pipeline, pipeline.params, jnp.asarray(ids), size=(64, 64))
    noise = jnp.zeros((1, 16, 16, 4))
    chex.clear_trace_counter()
    denoise_once = jax.jit(
        chex.assert_max_traces(lambda *a: denoise.__wrapped__(pipeline, *a), 1), static_argnums=()
    )
    send_once = jax.jit(chex.assert_max_traces(send.__wrapped__, 1))
    for steps, ratio in ((4, 0.1), (6, 0.5), (12, 0.8)):
        z = denoise_once(pipeline.params["unet"], noise, prompt, prompt, steps, 2.5, noise, 1.0)
        send_once(jax.random.key(0), z, ratio, 10.0 * ratio)


def test_image_to_image_keeps_more_at_low_strength(pipeline):
    start = np.full((64, 64, 3), 0.5, np.float32)
    outs = [
        generate(pipeline, Request(PROMPT, strength=s, ratio=0.0, psnr_db=math.inf), start).image_HxWx3
        for s in (0.1, 1.0)
    ]
    assert not np.allclose(*outs)


def test_workload_counts_this_backbone(pipeline):
    work = workload(pipeline, (64, 64))
    smaller = workload(pipeline, (32, 32))
    assert 0 < work.text_encoder_flops < work.vae_decoder_flops
    # Convolutions and dense layers grow with the pixels, attention with their square.
    assert 3.5 < work.vae_decoder_flops / smaller.vae_decoder_flops < 6
    assert work.text_encoder_flops == smaller.text_encoder_flops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"ratio": 1.2}, "from 0 to 0.9375"),
        ({"ratio": math.nan}, "from 0 to 0.9375"),
        ({"psnr_db": math.nan}, "perfect channel"),
        ({"guidance": -1.0}, "from 0 on"),
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


def test_folders_that_do_not_fit_together(folder, tmp_path):
    import json
    import shutil

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
