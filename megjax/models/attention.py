"""Scaled dot-product attention behind one function, and the layers made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from megjax.errors import MegError
from megjax.models.layers import ATTENDED, GroupNorm, conv, gelu, layer_norm, linear, scan, stack
from megjax.models.network import Options
from megjax.models.placement import batch_parts

IMPLEMENTATIONS = ("xla", "cudnn")

MAX_SCORE_BYTES = 96 * 2**20
"""Above this, in the values' dtype, the scores are computed for some queries at a time: 16384 tokens would
need 512 MiB a head in bfloat16. Larger blocks read the keys and values less often."""

Merge = Callable[[Array], tuple[Array, Callable[[Array], Array]]]
"""Merges similar tokens around one self-attention: x_BxNxD -> (merged_BxMxD, unmerge)."""

TokenMerge = Callable[[tuple[int, int], int], Merge | None]
"""Says for each transformer, by its grid of tokens and its number in the U-Net, how it merges, if at all."""


def attention(
    q_BxTxHxD: Float[Array, "B T H D"],
    k_BxSxHxD: Float[Array, "B S H D"],
    v_BxSxHxD: Float[Array, "B S H D"],
    *,
    implementation: str = "xla",
    causal: bool = False,
) -> Float[Array, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v with float32 scores, never holding more than `MAX_SCORE_BYTES` of them.

    Args:
        q_BxTxHxD: queries: batch, tokens, heads, head size.
        k_BxSxHxD: keys.
        v_BxSxHxD: values.
        implementation: `xla` runs anywhere; `cudnn` needs an NVIDIA GPU and bfloat16 or float16.
        causal: each token sees itself and those before it.

    Raises:
        MegError: for an unknown implementation, and for cuDNN where it isn't installed or in another dtype.
    """
    if implementation not in IMPLEMENTATIONS:
        raise MegError(f"attention {implementation!r} is not known; choose from {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cudnn":
        return _cudnn_attention(q_BxTxHxD, k_BxSxHxD, v_BxSxHxD, causal=causal)
    B, T, H, D = q_BxTxHxD.shape
    q_BxHxDxT, k_BxHxDxS, v_BxHxDxS = (
        _tokens_last(x) for x in ((q_BxTxHxD * D**-0.5).astype(q_BxTxHxD.dtype), k_BxSxHxD, v_BxSxHxD)
    )
    # Of one device's part of the batch.
    row_bytes = v_BxSxHxD.dtype.itemsize * (B // batch_parts(B)) * H * k_BxSxHxD.shape[1]
    out_BxHxDxT: Array
    if causal:
        out_BxHxDxT = _softmax_attention(q_BxHxDxT, k_BxHxDxS, v_BxHxDxS, causal=True)[0]
    elif T * row_bytes <= MAX_SCORE_BYTES and v_BxHxDxS.dtype == jnp.float32:
        # Small and on a CPU most likely: keeping the probabilities is quicker there than computing them anew.
        out_BxHxDxT = _softmax_attention(q_BxHxDxT, k_BxHxDxS, v_BxHxDxS)[0]
    else:
        block, added = _block_size(T, max(1, MAX_SCORE_BYTES // row_bytes))
        padded = jnp.pad(q_BxHxDxT, [(0, 0), (0, 0), (0, 0), (0, added)]) if added else q_BxHxDxT
        out_BxHxDxT = _blockwise_attention(padded, k_BxHxDxS, v_BxHxDxS, block)
        out_BxHxDxT = out_BxHxDxT[..., :T]
    return out_BxHxDxT.reshape(B, H * D, T).swapaxes(1, 2).reshape(B, T, H, D)


def _cudnn_attention(q: Array, k: Array, v: Array, *, causal: bool) -> Array:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise MegError(
            f"attention 'cudnn' in {q.dtype}: choose dtype bfloat16 or float16, or attention 'xla'"
        )
    try:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    except RuntimeError as error:
        # JAX asks for the library as it traces, so this holds ahead of time and for other platforms too.
        if type(error) is not RuntimeError:
            raise
        raise MegError(f"attention 'cudnn': {error} It needs an NVIDIA GPU; choose 'xla'") from error


def _tokens_last(x_BxTxHxD: Array) -> Array:
    """Tokens along the fastest axis: they fill a TPU's 128 lanes, of which a head of 64 would use half."""
    B, T, H, D = x_BxTxHxD.shape
    return x_BxTxHxD.reshape(B, T, H * D).swapaxes(1, 2).reshape(B, H, D, T)


def _softmax_attention(
    q_BxHxDxT: Array, k_BxHxDxS: Array, v_BxHxDxS: Array, *, causal: bool = False
) -> tuple[Array, Array]:
    """Attention of scaled queries, and the logarithm of each one's softmax's sum, float32.

    Divides the values by the sums, not T x S probabilities.
    """
    scores = jnp.einsum("BHDT,BHDS->BHTS", q_BxHxDxT, k_BxHxDxS, preferred_element_type=jnp.float32)
    if causal:
        T, S = scores.shape[-2:]
        seen = jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights_BxHxTxS = jnp.exp(scores - top)
    sums_BxHxT = weights_BxHxTxS.sum(-1)
    out = jnp.einsum(
        "BHTS,BHDS->BHDT",
        weights_BxHxTxS.astype(v_BxHxDxS.dtype),
        v_BxHxDxS,
        preferred_element_type=jnp.float32,
    )
    out = (out / sums_BxHxT[:, :, None, :]).astype(q_BxHxDxT.dtype)
    return out, top[..., 0] + jnp.log(sums_BxHxT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blockwise_attention(q_BxHxDxT: Array, k_BxHxDxS: Array, v_BxHxDxS: Array, block: int) -> Array:
    """`_softmax_attention` for `block` queries at a time; the backward pass computes the probabilities anew.

    As FlashAttention's (arXiv:2205.14135) it needs the output and one number a query for them.
    """
    return _blockwise_fwd(q_BxHxDxT, k_BxHxDxS, v_BxHxDxS, block)[0]


def _blockwise_fwd(q: Array, k: Array, v: Array, block: int) -> tuple[Array, Any]:
    if block == q.shape[-1]:
        out, lse_BxHxT = _softmax_attention(q, k, v)
    else:
        outputs = jax.lax.map(lambda part: _softmax_attention(part, k, v), _blocks(q, block))
        out, lse_BxHxT = map(_joined, outputs)
    out, lse_BxHxT = checkpoint_name(out, ATTENDED), checkpoint_name(lse_BxHxT, ATTENDED)
    return out, (q, k, v, out, lse_BxHxT)


def _blockwise_bwd(block: int, residuals: Any, d_out_BxHxDxT: Array) -> tuple[Array, Array, Array]:
    q, k, v, out, lse_BxHxT = residuals
    # The softmax's own gradient, FlashAttention's delta: sum over d of dO * O.
    lost_BxHxT = jnp.sum(d_out_BxHxDxT.astype(jnp.float32) * out.astype(jnp.float32), axis=2)

    def gradients(q: Array, d_out: Array, lse: Array, lost: Array) -> tuple[Array, Array, Array]:
        scores = jnp.einsum("BHDT,BHDS->BHTS", q, k, preferred_element_type=jnp.float32)
        p_BxHxTxS = jnp.exp(scores - lse[..., None]).astype(v.dtype)
        d_p = jnp.einsum("BHDT,BHDS->BHTS", d_out, v, preferred_element_type=jnp.float32)
        d_scores = (p_BxHxTxS * (d_p - lost[..., None])).astype(v.dtype)
        d_q = jnp.einsum("BHTS,BHDS->BHDT", d_scores, k, preferred_element_type=jnp.float32)
        d_k = jnp.einsum("BHTS,BHDT->BHDS", d_scores, q, preferred_element_type=jnp.float32)
        d_v = jnp.einsum("BHTS,BHDT->BHDS", p_BxHxTxS, d_out, preferred_element_type=jnp.float32)
        return d_q.astype(q.dtype), d_k, d_v

    T = q.shape[-1]
    if block == T:
        d_q, d_k, d_v = gradients(q, d_out_BxHxDxT, lse_BxHxT, lost_BxHxT)
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    def add(sums: tuple[Array, Array], parts: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        d_q, d_k, d_v = gradients(*parts)
        return (sums[0] + d_k, sums[1] + d_v), d_q

    blocks = tuple(_blocks(x, block) for x in (q, d_out_BxHxDxT, lse_BxHxT, lost_BxHxT))
    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(add, zeros, blocks)
    return _joined(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype)


_blockwise_attention.defvjp(_blockwise_fwd, _blockwise_bwd)


def _blocks(x: Array, block: int) -> Array:
    """(..., T) -> (T / block, ..., block)."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, block), -2, 0)


def _joined(x: Array) -> Array:
    """The inverse of `_blocks`."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


def _block_size(T: int, limit: int) -> tuple[int, int]:
    """Queries of a block, at most `limit`, and how many of none to add so that the blocks are whole.

    After merging T may be a prime, and its divisors would make as many blocks as there are queries.
    """
    limit = min(T, limit)
    divisor = next(d for d in range(limit, 0, -1) if T % d == 0)
    if 2 * divisor >= limit:
        return divisor, 0
    blocks = -(-T // limit)
    block = -(-T // blocks)
    return block, blocks * block - T


class Attention(nnx.Module):
    """Multi-head self- or cross-attention without biases on q, k and v."""

    def __init__(self, dim: int, context_dim: int, heads: int, options: Options, *, rngs: nnx.Rngs):
        self.heads = heads
        self.implementation = options.attention
        self.to_q = linear(dim, dim, options, bias=False, rngs=rngs)
        self.to_k = linear(context_dim, dim, options, bias=False, rngs=rngs)
        self.to_v = linear(context_dim, dim, options, bias=False, rngs=rngs)
        self.to_out_0 = linear(dim, dim, options, rngs=rngs)

    def __call__(self, x_BxTxD: Array, context_BxSxE: Array | None = None) -> Array:
        context = x_BxTxD if context_BxSxE is None else context_BxSxE

        def split(x: Array) -> Array:
            return x.reshape(*x.shape[:2], self.heads, -1)

        out = attention(
            split(self.to_q(x_BxTxD)),
            split(self.to_k(context)),
            split(self.to_v(context)),
            implementation=self.implementation,
        )
        return self.to_out_0(out.reshape(x_BxTxD.shape))


class GEGLU(nnx.Module):
    """x W + b gated by the GELU of a second such projection."""

    def __init__(self, d_in: int, d_out: int, options: Options, *, rngs: nnx.Rngs):
        self.proj = linear(d_in, 2 * d_out, options, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * gelu(gate)


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int, options: Options, *, rngs: nnx.Rngs):
        self.net_0 = GEGLU(dim, 4 * dim, options, rngs=rngs)
        self.net_2 = linear(4 * dim, dim, options, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.net_2(self.net_0(x))


class TransformerBlock(nnx.Module):
    """Self-attention (on merged tokens, if asked), cross-attention to the text, and a feed-forward layer."""

    def __init__(self, dim: int, context_dim: int, heads: int, options: Options, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, 1e-5, options, rngs=rngs)
        self.attn1 = Attention(dim, dim, heads, options, rngs=rngs)
        self.norm2 = layer_norm(dim, 1e-5, options, rngs=rngs)
        self.attn2 = Attention(dim, context_dim, heads, options, rngs=rngs)
        self.norm3 = layer_norm(dim, 1e-5, options, rngs=rngs)
        self.ff = FeedForward(dim, options, rngs=rngs)

    def __call__(self, x_BxNxD: Array, context_BxSxE: Array, merge: Merge | None = None) -> Array:
        h = self.norm1(x_BxNxD)
        if merge is None:
            x = x_BxNxD + self.attn1(h)
        else:
            merged, unmerge = merge(h)
            x = x_BxNxD + unmerge(self.attn1(merged))
        x = x + self.attn2(self.norm2(x), context_BxSxE)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """A stack of transformer blocks over a picture's pixels, with projections in and out and a residual."""

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        depth: int,
        options: Options,
        *,
        groups: int,
        linear_projection: bool,
        rngs: nnx.Rngs,
    ):
        self.options = options
        # 1e-6 here, whatever norm_eps says: as in PyTorch diffusers.
        self.norm = GroupNorm(channels, groups, 1e-6, options)

        def project() -> Any:
            if linear_projection:
                return linear(channels, channels, options, rngs=rngs)
            return conv(channels, channels, 1, options, rngs=rngs)

        self.proj_in = project()
        self.transformer_blocks = stack(
            depth, lambda rngs: TransformerBlock(channels, context_dim, heads, options, rngs=rngs), rngs
        )
        self.proj_out = project()

    def __call__(
        self,
        x_BxHxWxC: Array,
        context_BxSxE: Array,
        merge_at: Callable[[tuple[int, int]], Merge | None] = lambda _: None,
    ) -> Array:
        B, H, W, C = x_BxHxWxC.shape
        merge = merge_at((H, W))
        x = self.proj_in(self.norm(x_BxHxWxC)).reshape(B, H * W, C)

        def block(module: TransformerBlock, x: Array, context: Array) -> Array:
            return module(x, context, merge)

        x = scan(self.transformer_blocks, block, x, context_BxSxE, options=self.options)
        return x_BxHxWxC + self.proj_out(x.reshape(B, H, W, C))
