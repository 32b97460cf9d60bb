"""Batches against one another, and against the split in one process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megjax.errors import MegError
from megjax.link import wire
from megjax.link.payload import payload_bits
from megjax.merging import from_tokens, unmerge, unpack
from megjax.pipeline import Request, load_pipeline
from megjax.pipeline.generate import _denoiser
from megjax.pipeline.split import request_keys, send
from megjax.serve import engine

PROMPTS = ("a red circle left of a blue square", "a green triangle", "a blue circle above a red square")


def task(pipeline, seed=7, prompt=0, steps=6, ratio=0.4, guidance=2.5, dtype="float16"):
    request = Request(PROMPTS[prompt], seed=seed, steps=steps, ratio=ratio, guidance=guidance)
    return engine.prepare(pipeline, request, dtype)


def neighbours_do_not_matter(pipeline, batch):
    mine, others = task(pipeline), [task(pipeline, 11, 1, 12, 0.8, 0.0), task(pipeline, 2**32 - 1, 2, 4, 0.0)]
    alone = engine.messages(pipeline, [mine], batch)[0][0]
    for place in range(batch):
        row = [others[i % 2] for i in range(batch)]
        row[place] = mine
        assert engine.messages(pipeline, row, batch)[0][place] == alone
    return alone


def test_a_message_depends_on_neither_neighbours_nor_place(pipeline):
    alone = neighbours_do_not_matter(pipeline, 2)
    assert neighbours_do_not_matter(pipeline, 1) == engine.messages(pipeline, [task(pipeline)], 1)[0][0]
    # Another batch size may round otherwise, by no more than a last place or two of float16.
    other = wire.decode(engine.messages(pipeline, [task(pipeline)], 1)[0][0].message)
    ours = wire.decode(alone.message)
    np.testing.assert_array_equal(ours.key_data, other.key_data)
    np.testing.assert_allclose(ours.features_MxD, other.features_MxD, rtol=4e-3, atol=4e-3)


@pytest.mark.long
def test_meg_tinys_messages_depend_on_neither(pipeline):
    tiny = load_pipeline("tiny")
    for batch in (1, 2, 4):
        neighbours_do_not_matter(tiny, batch)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
@pytest.mark.parametrize(
    ("steps", "ratio", "tome"), [(4, 0.0, 0.0), (7, 0.4, 0.0), (5, 0.9, 0.0), (5, 0.4, 0.5)]
)
def test_messages_are_the_splits_own(pipeline, seed, steps, ratio, tome):
    request = Request(PROMPTS[0], seed=seed, steps=steps, ratio=ratio)
    sent = engine.messages(pipeline, [task(pipeline, seed, steps=steps, ratio=ratio)], 1, tome)[0][0]
    z = _denoiser(pipeline, request, None, lambda _: None)(steps, tome)
    expected = send(request_keys(seed).link, z, ratio, jnp.inf)
    received = unpack(sent.message)
    ours = from_tokens(unmerge(received.merged_NxD, received.plan)[None], received.header.grid)
    # `send` rounds to float16 as the wire does.
    np.testing.assert_allclose(ours, expected.z_BxHxWxC, rtol=2e-3, atol=2e-3)
    assert sent.tokens == int(expected.tokens_B[0]) == len(received.header.features_MxD)


def test_a_seed_is_the_same_message_whatever_jaxs_generator_and_dtype_are(pipeline):
    def sent():
        return engine.messages(pipeline, [task(pipeline, 7)], 1)[0][0].message

    ours = sent()
    with jax.default_prng_impl("rbg"):
        assert sent() == ours
    with jax.enable_x64(True):
        assert sent() == ours


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_body_is_as_long_as_it_is_charged(pipeline, dtype):
    for ratio in (0.0, 0.1, 0.4, 0.75, 0.8, 0.9375):
        sent = engine.messages(pipeline, [task(pipeline, ratio=ratio, dtype=dtype)], 1)[0][0]
        assert 8 * (len(sent.message) - wire.HEADER_BYTES) == sent.payload_bits
        bits = 8 if dtype == "int8" else 16
        assert sent.payload_bits == payload_bits(ratio, 64, 16, bits)
        decoded = wire.decode(sent.message)
        assert decoded.dtype == dtype
        assert np.float32(decoded.ratio) == np.float32(ratio)


@pytest.mark.parametrize(("side", "most"), [(128, 0.62), (16, 0.64)], ids=["sdxl", "tiny"])
def test_merging_makes_messages_shorter(side, most):
    z = jax.random.normal(jax.random.key(0), (1, side, side, 4))
    length = {}
    for ratio in (0.0, 0.4):
        merged = engine.merge(z, jnp.zeros(1, jnp.uint32), jnp.full(1, ratio))
        count = int(merged.plan.count[0])
        message = wire.encode(
            np.asarray(merged.features_BxNxD[0][:count]),
            [(np.asarray(r.merged_A[0]), np.asarray(r.best_A[0])) for r in merged.plan.rounds],
            grid=(side // 2, side // 2),
            ratio=ratio,
            key_data=np.asarray(merged.key_Bx2[0]),
        )
        length[ratio] = len(message)
    assert length[0.0] == 2 * side * side * 4 + wire.HEADER_BYTES
    assert length[0.4] <= most * length[0.0]


def test_filling_rows_add_no_steps(pipeline):
    few, many = task(pipeline, steps=4), task(pipeline, steps=9)
    np.testing.assert_array_equal(engine._column([many, few], 4, "steps"), [9, 4, 4, 4])
    np.testing.assert_array_equal(engine._column([many, few], 4, "seed"), [7, 7, 7, 7])


def test_what_cannot_be_sent_is_refused_alone(pipeline, monkeypatch):
    def denoised(*_, **__):
        return jnp.stack([jnp.ones((16, 16, 4)), jnp.full((16, 16, 4), jnp.nan)])

    monkeypatch.setattr(engine, "denoise_rows", denoised)
    (good, broken), _ = engine.messages(pipeline, [task(pipeline), task(pipeline)], 2)
    assert good.tokens == 39
    assert isinstance(broken, MegError)
    assert "not finite" in str(broken)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 0.95}, "0.9375"),
        ({"steps": 3}, "steps 3: from 4"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "a " * 100}, "shorten"),
        ({"height": 65, "width": 64}, "multiples"),
    ],
)
def test_prepare_refuses_what_cannot_be_generated(pipeline, changes, words):
    fields = {"prompt": PROMPTS[0], "steps": 6, **changes}
    with pytest.raises(MegError, match=words):
        engine.prepare(pipeline, Request(**fields), "float16")
