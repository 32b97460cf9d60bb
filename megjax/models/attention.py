"""Scaled dot-product attention behind one function, and the layers made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from megjax.errors import MegError
from megjax.models.layers import GroupNorm, conv, gelu, layer_norm, linear, scan, stack
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
        MegError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise MegError(f"attention {implementation!r} is not known; choose from {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BxTxHxD, k_BxSxHxD, v_BxSxHxD, is_causal=causal, implementation="cudnn"
        )
    B, T, H, D = q_BxTxHxD.shape
    q_BxHxDxT, k_BxHxDxS, v_BxHxDxS = (
        _tokens_last(x) for x in ((q_BxTxHxD * D**-0.5).astype(q_BxTxHxD.dtype), k_BxSxHxD, v_BxSxHxD)
    )
    # Of one device's part of the batch.
    row_bytes = v_BxSxHxD.dtype.itemsize * (B // batch_parts(B)) * H * k_BxSxHxD.shape[1]
    if causal or T * row_bytes <= MAX_SCORE_BYTES:
        out_BxHxDxT = _softmax_attention(q_BxHxDxT, k_BxHxDxS, v_BxHxDxS, causal)
    else:
        block = _largest_divisor(T, max(1, MAX_SCORE_BYTES // row_bytes))

        # Checkpointed, or the backward pass would keep every block's probabilities after all.
        @jax.checkpoint
        def columns(q_BxHxDxt: Array) -> Array:
            return _softmax_attention(q_BxHxDxt, k_BxHxDxS, v_BxHxDxS, False)

        q_blocks = jnp.moveaxis(q_BxHxDxT.reshape(B, H, D, T // block, block), 3, 0)
        out_BxHxDxT = jnp.moveaxis(jax.lax.map(columns, q_blocks), 0, 3).reshape(B, H, D, T)
    return out_BxHxDxT.reshape(B, H * D, T).swapaxes(1, 2).reshape(B, T, H, D)


def _tokens_last(x_BxTxHxD: Array) -> Array:
    """Tokens along the fastest axis: they fill a TPU's 128 lanes, of which a head of 64 would use half."""
    B, T, H, D = x_BxTxHxD.shape
    return x_BxTxHxD.reshape(B, T, H * D).swapaxes(1, 2).reshape(B, H, D, T)


def _softmax_attention(q_BxHxDxT: Array, k_BxHxDxS: Array, v_BxHxDxS: Array, causal: bool) -> Array:
    """Attention of scaled queries; divides the values by the softmax's sums, not T x S probabilities."""
    scores = jnp.einsum("BHDT,BHDS->BHTS", q_BxHxDxT, k_BxHxDxS, preferred_element_type=jnp.float32)
    if causal:
        T, S = scores.shape[-2:]
        seen = jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights_BxHxTxS = jnp.exp(scores - top)
    sums_BxHx1xT = weights_BxHxTxS.sum(-1)[:, :, None, :]
    out = jnp.einsum(
        "BHTS,BHDS->BHDT",
        weights_BxHxTxS.astype(v_BxHxDxS.dtype),
        v_BxHxDxS,
        preferred_element_type=jnp.float32,
    )
    return (out / sums_BxHx1xT).astype(q_BxHxDxT.dtype)


def _largest_divisor(n: int, limit: int) -> int:
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


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
