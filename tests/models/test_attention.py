"""Attention: against a float64 softmax, in blocks, masked, and what it never holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megjax.errors import MegError
from megjax.models.attention import MAX_SCORE_BYTES, _block_size
from megjax.models.attention import attention as attend


def qkv(B=2, T=12, S=9, H=3, D=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(k, (B, n, H, D), dtype) for k, n in zip(keys, (T, S, S), strict=True))


def reference(q, k, v, causal=False):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("causal", [False, True])
def test_against_float64(causal):
    q, k, v = qkv(T=9)
    out = attend(q, k, v, causal=causal)
    np.testing.assert_allclose(out, reference(q, k, v, causal), atol=2e-6)


def test_large_scores_do_not_overflow():
    q, k, v = qkv()
    out = attend(1e4 * q, k, v)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, reference(1e4 * q, k, v), atol=1e-3)


def test_bfloat16_stays_near_float32():
    q, k, v = qkv(dtype=jnp.bfloat16)
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), reference(q, k, v), atol=0.03)


@pytest.mark.parametrize("T", [24, 23])
def test_blocks_give_the_same_values_and_gradients(monkeypatch, T):
    q, k, v = qkv(T=T)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v)))

    whole = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr("megjax.models.attention.MAX_SCORE_BYTES", 4 * 2 * 3 * 9 * 5)  # five rows
    blocks = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), whole, blocks)


@pytest.mark.parametrize("rows", [5, 1000])
def test_gradients_in_bfloat16_are_those_of_float32_rounded(monkeypatch, rows):
    q, k, v, wanted = *qkv(T=24, dtype=jnp.bfloat16), qkv(T=24)[0]

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v).astype(jnp.float32) * wanted)

    exact = jax.grad(loss, (0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))
    monkeypatch.setattr("megjax.models.attention.MAX_SCORE_BYTES", 2 * 2 * 3 * 9 * rows)
    for a, b in zip(jax.grad(loss, (0, 1, 2))(q, k, v), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


def test_the_backward_pass_keeps_no_probabilities():
    x = jax.ShapeDtypeStruct((2, 128, 3, 16), jnp.bfloat16)
    _, kept = jax.eval_shape(lambda q, k, v: jax.vjp(attend, q, k, v), x, x, x)
    sizes = [leaf.size for leaf in jax.tree.leaves(kept)]
    assert sizes
    assert max(sizes) < 128 * 128


def test_scores_of_16384_tokens_are_never_all_held():
    # The SDXL decoder's mid block at 1024 x 1024: one head of 512; all scores would be 1 GiB.
    x = jax.ShapeDtypeStruct((1, 16384, 1, 512), jnp.float32)
    text = jax.jit(attend).lower(x, x, x).as_text()
    assert "16384x16384" not in text
    largest = max(
        int(np.prod([int(n) for n in shape.split("x")[:-1]])) * 4
        for shape in set(_tensor_shapes(text))
        if shape.endswith("xf32")
    )
    assert largest <= MAX_SCORE_BYTES


def _tensor_shapes(text):
    import re

    return re.findall(r"tensor<([0-9x]+xf32)>", text)


@settings(max_examples=50, deadline=None)
@given(T=st.integers(1, 20000), limit=st.integers(1, 20000))
def test_blocks_are_few_and_within_the_limit(T, limit):
    block, added = _block_size(T, limit)
    assert (T + added) % block == 0
    assert block <= limit
    fewest = -(-T // limit)
    assert (T + added) // block <= 2 * fewest
    assert added < fewest


def test_unknown_implementation():
    with pytest.raises(MegError, match="xla, cudnn"):
        attend(*qkv(), implementation="flash")


def test_cudnn_that_is_not_there(monkeypatch):
    # Whether by a call, by tracing, or ahead of time for a GPU.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)
    x = qkv(S=12, dtype=jnp.bfloat16)
    run = jax.jit(lambda q, k, v: attend(q, k, v, implementation="cudnn"))
    for call in (run, lambda *x: run.trace(*x).lower(lowering_platforms=("cuda",))):
        with pytest.raises(MegError, match="needs an NVIDIA GPU; choose 'xla'"):
            call(*x)
    with pytest.raises(MegError, match="'cudnn' in float32: choose dtype bfloat16"):
        attend(*qkv(), implementation="cudnn")
