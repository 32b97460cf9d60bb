"""Layers shared by the U-Net, the VAE and the text encoders, with PyTorch's numerics. Images are NHWC."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from megjax.models.network import Options
from megjax.models.placement import gathered

ATTENDED = "attention's output"
"""Kept where all else of a layer is recomputed: few bytes for the most costly part."""


class Linear(nnx.Linear):
    """`nnx.Linear`, in float32 over flattened leading axes.

    The weight's gradient then contracts one axis: over two, XLA's CPU backend takes twice as long. In half
    precision, on accelerators, the flat shape would only come between operations that could be one.
    """

    def __call__(self, inputs: Array) -> Array:
        if jnp.dtype(self.dtype) != jnp.float32:
            return super().__call__(inputs)
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return flat.reshape(*inputs.shape[:-1], -1)


def linear(d_in: int, d_out: int, options: Options, *, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    """A dense layer in the options' dtypes."""
    return Linear(d_in, d_out, use_bias=bias, dtype=options.dtype, param_dtype=options.param_dtype, rngs=rngs)


def conv(
    c_in: int,
    c_out: int,
    kernel: int,
    options: Options,
    *,
    rngs: nnx.Rngs,
    stride: int = 1,
    padding: Any = None,
) -> nnx.Conv:
    """A square 2-D convolution, padded on both sides by half its kernel unless told otherwise."""
    return nnx.Conv(
        c_in,
        c_out,
        (kernel, kernel),
        strides=stride,
        padding=((kernel // 2, kernel // 2),) * 2 if padding is None else padding,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        rngs=rngs,
    )


def layer_norm(dim: int, eps: float, options: Options, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation; statistics in float32, in one pass that a TPU fuses with matrix products."""
    return nnx.LayerNorm(
        dim,
        epsilon=eps,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        use_fast_variance=True,
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Group normalisation over NHWC pictures; statistics in float32.

    Sums each channel first and then its group, and applies one multiply-add a value: `nnx.GroupNorm`'s
    reduction over (H, W, C / groups) takes XLA's CPU backend 2 to 7 times as long.
    """

    def __init__(self, channels: int, groups: int, eps: float, options: Options):
        self.groups = groups
        self.eps = eps
        self.dtype = options.dtype
        self.scale = nnx.Param(jnp.ones((channels,), options.param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), options.param_dtype))

    def __call__(self, x_BxHxWxC: Array) -> Array:
        B, H, W, C = x_BxHxWxC.shape
        if jnp.dtype(self.dtype) != jnp.float32:
            # Or XLA keeps the float32 that a convolution sums in, and its squares, instead of the bfloat16.
            x_BxHxWxC = jax.lax.optimization_barrier(x_BxHxWxC)
        x = x_BxHxWxC.astype(jnp.float32)
        count = H * W * C // self.groups

        def per_group(sum_BxC: Array) -> Array:
            return sum_BxC.reshape(B, self.groups, -1).sum(-1, keepdims=True) / count

        mean_BxGx1 = per_group(x.sum((1, 2)))
        variance_BxGx1 = jnp.maximum(per_group(jnp.square(x).sum((1, 2))) - jnp.square(mean_BxGx1), 0.0)
        scale, bias = (
            p[...].astype(jnp.float32).reshape(1, self.groups, -1) for p in (self.scale, self.bias)
        )
        gain = jax.lax.rsqrt(variance_BxGx1 + self.eps) * scale
        offset = (bias - mean_BxGx1 * gain).reshape(B, 1, 1, C)
        return (x * gain.reshape(B, 1, 1, C) + offset).astype(self.dtype)


def stack(depth: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`depth` equal modules as one, parameters with a leading depth axis: compiled once, see `scan`."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_all(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return make_all(rngs)


def scan(
    stacked: nnx.Module,
    step: Callable[..., Array],
    x: Array,
    *args: Any,
    options: Options,
    layers: slice = slice(None),
) -> Array:
    """Run x through the stacked modules in turn: `x = step(module_i, x, *args)`.

    On a mesh that cuts parameters, each device holds one layer whole at a time.
    """
    graphdef, params = nnx.split(stacked)
    if layers != slice(None):
        params = jax.tree.map(lambda p: p[layers], params)

    def body(x: Array, layer: Any) -> tuple[Array, None]:
        return step(nnx.merge(graphdef, gathered(layer, options.dtype)), x, *args), None

    if options.remat:
        body = jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))
    return jax.lax.scan(body, x, params)[0]


def gelu(x: Array) -> Array:
    """The exact, erf-based GELU of PyTorch; Flax diffusers' is the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """CLIP's GELU: x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def sinusoidal(
    t_B: Float[Array, ...] | Int[Array, ...],
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: int = 0,
) -> Float[Array, "... dim"]:
    """Sinusoidal embedding of timesteps or sizes, in float32: bfloat16 would round 999 to 1000.

    Args:
        t_B: timesteps in [0, 1000], or sizes in pixels.
        dim: width of the embedding; even.
        flip_sin_to_cos: cosines first.
        freq_shift: subtracted from dim / 2 in the exponent's denominator.
    """
    half = dim // 2
    exponent = -math.log(10_000) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32)
    angle = jnp.asarray(t_B, jnp.float32)[..., None] * jnp.exp(exponent).reshape(
        (1,) * jnp.ndim(t_B) + (half,)
    )
    first, second = (jnp.cos, jnp.sin) if flip_sin_to_cos else (jnp.sin, jnp.cos)
    return jnp.concatenate([first(angle), second(angle)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two dense layers with SiLU between them."""

    def __init__(self, d_in: int, d_out: int, options: Options, *, rngs: nnx.Rngs):
        self.linear_1 = linear(d_in, d_out, options, rngs=rngs)
        self.linear_2 = linear(d_out, d_out, options, rngs=rngs)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """GroupNorm, SiLU, 3 x 3 convolution, twice; the time embedding is added between; plus a shortcut."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        options: Options,
        *,
        groups: int,
        eps: float,
        time_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(c_in, groups, eps, options)
        self.conv1 = conv(c_in, c_out, 3, options, rngs=rngs)
        if time_dim is not None:
            self.time_emb_proj = linear(time_dim, c_out, options, rngs=rngs)
        self.norm2 = GroupNorm(c_out, groups, eps, options)
        self.conv2 = conv(c_out, c_out, 3, options, rngs=rngs)
        if c_in != c_out:
            self.conv_shortcut = conv(c_in, c_out, 1, options, rngs=rngs)

    def __call__(self, x_BxHxWxC: Array, emb_BxE: Array | None = None) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x_BxHxWxC)))
        if emb_BxE is not None:
            h = h + self.time_emb_proj(nnx.silu(emb_BxE))[:, None, None, :]
        h = self.conv2(nnx.silu(self.norm2(h)))
        shortcut = self.conv_shortcut(x_BxHxWxC) if hasattr(self, "conv_shortcut") else x_BxHxWxC
        return shortcut + h


class Downsample(nnx.Module):
    """Halves the picture by a strided convolution; the VAE's pads below and to the right only."""

    def __init__(self, channels: int, options: Options, *, asymmetric: bool = False, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1)) if asymmetric else None
        self.conv = conv(channels, channels, 3, options, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x_BxHxWxC: Array) -> Array:
        return self.conv(x_BxHxWxC)


class Upsample(nnx.Module):
    """Doubles the picture by nearest neighbour, then convolves; `size` crops to an odd skip connection."""

    def __init__(self, channels: int, options: Options, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, options, rngs=rngs)

    def __call__(self, x_BxHxWxC: Array, size: tuple[int, int] | None = None) -> Array:
        B, H, W, C = x_BxHxWxC.shape
        rows, cols = size or (2 * H, 2 * W)
        x = jnp.broadcast_to(x_BxHxWxC[:, :, None, :, None, :], (B, H, 2, W, 2, C)).reshape(
            B, 2 * H, 2 * W, C
        )
        return self.conv(x[:, :rows, :cols])
