"""SDXL's `UNet2DConditionModel`: predicts the noise in a latent, given timestep, text and sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from megjax.models.attention import Merge, TokenMerge, Transformer2D
from megjax.models.configs import UNetConfig
from megjax.models.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    conv,
    sinusoidal,
)
from megjax.models.network import Network, Options, network
from megjax.models.placement import gathered, spread

MergeAt = Callable[[tuple[int, int]], Merge | None]


class _Block(nnx.Module):
    """Resnets, each followed by a transformer where the block has cross-attention."""

    def __init__(
        self,
        config: UNetConfig,
        options: Options,
        level: int,
        channels_in: list[int],
        *,
        cross_attention: bool,
        extra_resnet: bool = False,
        rngs: nnx.Rngs,
    ):
        channels = config.block_out_channels[level]
        time_dim = 4 * config.block_out_channels[0]
        widths = channels_in + [channels] * extra_resnet
        self.options = options
        self.resnets = nnx.List(
            [
                ResnetBlock(
                    c_in,
                    channels,
                    options,
                    groups=config.norm_num_groups,
                    eps=config.norm_eps,
                    time_dim=time_dim,
                    rngs=rngs,
                )
                for c_in in widths
            ]
        )
        if cross_attention:
            self.attentions = nnx.List(
                [
                    Transformer2D(
                        channels,
                        config.cross_attention_dim,
                        config.attention_head_dim[level],
                        config.transformer_layers_per_block[level],
                        options,
                        groups=config.norm_num_groups,
                        linear_projection=config.use_linear_projection,
                        rngs=rngs,
                    )
                    for _ in channels_in
                ]
            )

    def resnet(self, i: int, x: Array, emb: Array) -> Array:
        graphdef, params = nnx.split(self.resnets[i])

        def apply(params: Any, x: Array, emb: Array) -> Array:
            return nnx.merge(graphdef, gathered(params, self.options.dtype))(x, emb)

        return (jax.checkpoint(apply) if self.options.remat else apply)(params, x, emb)

    def attend(self, i: int, x: Array, text: Array, merge_at: MergeAt) -> Array:
        return self.attentions[i](x, text, merge_at) if hasattr(self, "attentions") else x


class DownBlock(_Block):
    """`DownBlock2D` and `CrossAttnDownBlock2D`: each resnet's output is kept for the way up."""

    def __init__(self, config: UNetConfig, options: Options, level: int, *, rngs: nnx.Rngs):
        outs = config.block_out_channels
        first = outs[max(level - 1, 0)]
        super().__init__(
            config,
            options,
            level,
            [first] + [outs[level]] * (config.layers_per_block - 1),
            cross_attention=config.down_block_types[level] == "CrossAttnDownBlock2D",
            rngs=rngs,
        )
        if level < len(outs) - 1:
            self.downsamplers = nnx.List([Downsample(outs[level], options, rngs=rngs)])

    def __call__(self, x: Array, emb: Array, text: Array, merge_at: MergeAt) -> tuple[Array, list[Array]]:
        skips = []
        for i in range(len(self.resnets)):
            x = self.attend(i, self.resnet(i, x, emb), text, merge_at)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(_Block):
    """`UNetMidBlock2DCrossAttn`: resnet, transformer, resnet."""

    def __init__(self, config: UNetConfig, options: Options, *, rngs: nnx.Rngs):
        last = len(config.block_out_channels) - 1
        channels = config.block_out_channels[last]
        super().__init__(
            config, options, last, [channels], cross_attention=True, extra_resnet=True, rngs=rngs
        )

    def __call__(self, x: Array, emb: Array, text: Array, merge_at: MergeAt) -> Array:
        x = self.attend(0, self.resnet(0, x, emb), text, merge_at)
        return self.resnet(1, x, emb)


class UpBlock(_Block):
    """`UpBlock2D` and `CrossAttnUpBlock2D`: each resnet sees the skip connection of its size."""

    def __init__(self, config: UNetConfig, options: Options, position: int, *, rngs: nnx.Rngs):
        outs = config.block_out_channels
        level = len(outs) - 1 - position
        below = outs[min(level + 1, len(outs) - 1)]
        skips = [outs[level]] * config.layers_per_block + [outs[max(level - 1, 0)]]
        inputs = [below] + [outs[level]] * config.layers_per_block
        super().__init__(
            config,
            options,
            level,
            [a + b for a, b in zip(inputs, skips, strict=True)],
            cross_attention=config.up_block_types[position] == "CrossAttnUpBlock2D",
            rngs=rngs,
        )
        if level > 0:
            self.upsamplers = nnx.List([Upsample(outs[level], options, rngs=rngs)])

    def __call__(self, x: Array, skips: list[Array], emb: Array, text: Array, merge_at: MergeAt) -> Array:
        for i in range(len(self.resnets)):
            x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.attend(i, self.resnet(i, x, emb), text, merge_at)
        if hasattr(self, "upsamplers"):
            _, rows, cols, _ = skips[-1].shape
            x = self.upsamplers[0](x, (rows, cols))
        return x


class UNet(nnx.Module):
    """The denoiser eps_theta(z_t, t, text) of Eqs. (10)-(12)."""

    def __init__(self, config: UNetConfig, options: Options, *, rngs: nnx.Rngs):
        outs = config.block_out_channels
        time_dim = 4 * outs[0]
        self.config = config
        self.dtype = options.dtype
        self.conv_in = conv(config.in_channels, outs[0], 3, options, rngs=rngs)
        self.time_embedding = TimestepEmbedding(outs[0], time_dim, options, rngs=rngs)
        self.add_embedding = TimestepEmbedding(
            config.projection_class_embeddings_input_dim, time_dim, options, rngs=rngs
        )
        levels = range(len(outs))
        self.down_blocks = nnx.List([DownBlock(config, options, i, rngs=rngs) for i in levels])
        self.mid_block = MidBlock(config, options, rngs=rngs)
        self.up_blocks = nnx.List([UpBlock(config, options, i, rngs=rngs) for i in levels])
        self.conv_norm_out = GroupNorm(outs[0], config.norm_num_groups, config.norm_eps, options)
        self.conv_out = conv(outs[0], config.out_channels, 3, options, rngs=rngs)

    def __call__(
        self,
        z_BxHxWxC: Float[Array, "B H W C"],
        t_B: Num[Array, " B"],
        text_BxLxE: Float[Array, "B L E"],
        pooled_BxP: Float[Array, "B P"],
        sizes_Bx6: Num[Array, "B 6"],
        token_merge: TokenMerge | None = None,
    ) -> Float[Array, "B H W C_out"]:
        """Predict the noise in z_t.

        Args:
            z_BxHxWxC: noisy latents, NHWC.
            t_B: timesteps in [0, 1000], integer or float.
            text_BxLxE: the text encoders' penultimate hidden states, side by side.
            pooled_BxP: pooled text embedding of the projecting encoder.
            sizes_Bx6: original height and width, crop top and left, target height and width; pixels.
            token_merge: merges tokens around self-attention (ToMe, `megjax.merging.tome`).

        Returns:
            The predicted noise, float32.
        """
        cfg = self.config
        z_BxHxWxC, t_B, text_BxLxE, pooled_BxP, sizes_Bx6 = map(
            spread, (z_BxHxWxC, t_B, text_BxLxE, pooled_BxP, sizes_Bx6)
        )
        numbers = itertools.count()

        def merge_at(grid: tuple[int, int]) -> Merge | None:
            return None if token_merge is None else token_merge(grid, next(numbers))

        time = sinusoidal(
            t_B, cfg.block_out_channels[0], flip_sin_to_cos=cfg.flip_sin_to_cos, freq_shift=cfg.freq_shift
        )
        sizes = sinusoidal(
            sizes_Bx6,
            cfg.addition_time_embed_dim,
            flip_sin_to_cos=cfg.flip_sin_to_cos,
            freq_shift=cfg.freq_shift,
        ).reshape(len(t_B), -1)
        added = jnp.concatenate([pooled_BxP.astype(self.dtype), sizes.astype(self.dtype)], axis=-1)
        emb_BxE = self.time_embedding(time.astype(self.dtype)) + self.add_embedding(added)
        text = text_BxLxE.astype(self.dtype)

        x = self.conv_in(z_BxHxWxC.astype(self.dtype))
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, emb_BxE, text, merge_at)
            skips += outputs
        x = self.mid_block(x, emb_BxE, text, merge_at)
        for block in self.up_blocks:
            x = block(x, skips, emb_BxE, text, merge_at)
        return self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)


def unet(config: UNetConfig, options: Options = Options()) -> Network:
    """The U-Net as a function `(params, z, t, text, pooled, sizes) -> eps`; see `UNet.__call__`."""
    return network(UNet, config, options)


def time_ids(height: int, width: int, batch: int) -> Int[Array, "B 6"]:
    """SDXL's size conditioning of an uncropped picture, `sizes_Bx6` of the U-Net; pixels."""
    return jnp.broadcast_to(jnp.array([[height, width, 0, 0, height, width]], jnp.int32), (batch, 6))
