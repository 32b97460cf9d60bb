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

IMPLEMENTATIONS = ("xla", "cudnn")

MAX_LOGIT_BYTES = 64 * 2**20
"""Above this the scores are computed for some queries at a time: 16384 tokens would need 1 GiB a head."""

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
    """softmax(q k^T / sqrt(D)) v with float32 scores, never holding more than `MAX_LOGIT_BYTES` of them.

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
    q_BxTxHxD = (q_BxTxHxD * D**-0.5).astype(q_BxTxHxD.dtype)
    row_bytes = 4 * B * H * k_BxSxHxD.shape[1]
    if causal or T * row_bytes <= MAX_LOGIT_BYTES:
        return _softmax_attention(q_BxTxHxD, k_BxSxHxD, v_BxSxHxD, causal)
    block = _largest_divisor(T, max(1, MAX_LOGIT_BYTES // row_bytes))

    # Checkpointed, or the backward pass would keep every block's probabilities after all.
    @jax.checkpoint
    def rows(q_BxtxHxD: Array) -> Array:
        return _softmax_attention(q_BxtxHxD, k_BxSxHxD, v_BxSxHxD, False)

    q_blocks = q_BxTxHxD.reshape(B, T // block, block, H, -1).swapaxes(0, 1)
    return jax.lax.map(rows, q_blocks).swapaxes(0, 1).reshape(q_BxTxHxD.shape)


def _softmax_attention(q_BxTxHxD: Array, k_BxSxHxD: Array, v_BxSxHxD: Array, causal: bool) -> Array:
    """Attention of scaled queries; divides the values by the softmax's sums, not T x S probabilities."""
    scores = jnp.einsum("BTHD,BSHD->BHTS", q_BxTxHxD, k_BxSxHxD, preferred_element_type=jnp.float32)
    if causal:
        T, S = scores.shape[-2:]
        seen = jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights_BxHxTxS = jnp.exp(scores - top)
    sums_BxTxHx1 = weights_BxHxTxS.sum(-1).swapaxes(1, 2)[..., None]
    out = jnp.einsum(
        "BHTS,BSHD->BTHD",
        weights_BxHxTxS.astype(v_BxSxHxD.dtype),
        v_BxSxHxD,
        preferred_element_type=jnp.float32,
    )
    return (out / sums_BxTxHx1).astype(q_BxTxHxD.dtype)


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
        self.remat = options.remat
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

        x = scan(self.transformer_blocks, block, x, context_BxSxE, remat=self.remat)
        return x_BxHxWxC + self.proj_out(x.reshape(B, H, W, C))
