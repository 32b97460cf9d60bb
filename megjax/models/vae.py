"""`AutoencoderKL`: its encoder (on the edge server) and its decoder (on the device) are separate networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from megjax.models.attention import attention
from megjax.models.configs import VAEConfig
from megjax.models.layers import Downsample, GroupNorm, ResnetBlock, Upsample, conv, linear
from megjax.models.network import Network, Options, network

EPS = 1e-6


class VAEAttention(nnx.Module):
    """Single-head self-attention over all pixels, with a residual."""

    def __init__(self, channels: int, options: Options, *, groups: int, rngs: nnx.Rngs):
        self.implementation = options.attention
        self.group_norm = GroupNorm(channels, groups, EPS, options)
        self.query = linear(channels, channels, options, rngs=rngs)
        self.key = linear(channels, channels, options, rngs=rngs)
        self.value = linear(channels, channels, options, rngs=rngs)
        self.proj_attn = linear(channels, channels, options, rngs=rngs)

    def __call__(self, x_BxHxWxC: Array) -> Array:
        B, H, W, C = x_BxHxWxC.shape
        h = self.group_norm(x_BxHxWxC).reshape(B, H * W, C)
        q, k, v = (layer(h)[:, :, None, :] for layer in (self.query, self.key, self.value))
        # cuDNN's kernels stop at a head size of 256; this one head has 512.
        implementation = "xla" if C > 256 else self.implementation
        out = attention(q, k, v, implementation=implementation)[:, :, 0, :]
        return x_BxHxWxC + self.proj_attn(out).reshape(B, H, W, C)


class _MidBlock(nnx.Module):
    def __init__(self, config: VAEConfig, options: Options, *, rngs: nnx.Rngs):
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nnx.List(
            [ResnetBlock(channels, channels, options, groups=groups, eps=EPS, rngs=rngs) for _ in range(2)]
        )
        if config.mid_block_add_attention:
            self.attentions = nnx.List([VAEAttention(channels, options, groups=groups, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return self.resnets[1](x)


class _Level(nnx.Module):
    """Resnets of one resolution and the change to the next."""

    downsamplers: nnx.List
    upsamplers: nnx.List

    def __init__(
        self, c_in: int, c_out: int, resnets: int, config: VAEConfig, options: Options, *, rngs: nnx.Rngs
    ):
        self.resnets = nnx.List(
            [
                ResnetBlock(
                    c_in if i == 0 else c_out,
                    c_out,
                    options,
                    groups=config.norm_num_groups,
                    eps=EPS,
                    rngs=rngs,
                )
                for i in range(resnets)
            ]
        )

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class _EncoderTrunk(nnx.Module):
    def __init__(self, config: VAEConfig, options: Options, *, rngs: nnx.Rngs):
        outs = config.block_out_channels
        self.conv_in = conv(config.in_channels, outs[0], 3, options, rngs=rngs)
        self.down_blocks = nnx.List([])
        for i, c_out in enumerate(outs):
            level = _Level(outs[max(i - 1, 0)], c_out, config.layers_per_block, config, options, rngs=rngs)
            if i < len(outs) - 1:
                level.downsamplers = nnx.List([Downsample(c_out, options, asymmetric=True, rngs=rngs)])
            self.down_blocks.append(level)
        self.mid_block = _MidBlock(config, options, rngs=rngs)
        self.conv_norm_out = GroupNorm(outs[-1], config.norm_num_groups, EPS, options)
        self.conv_out = conv(outs[-1], 2 * config.latent_channels, 3, options, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class _DecoderTrunk(nnx.Module):
    def __init__(self, config: VAEConfig, options: Options, *, rngs: nnx.Rngs):
        outs = config.block_out_channels[::-1]
        self.conv_in = conv(config.latent_channels, outs[0], 3, options, rngs=rngs)
        self.mid_block = _MidBlock(config, options, rngs=rngs)
        self.up_blocks = nnx.List([])
        for i, c_out in enumerate(outs):
            level = _Level(
                outs[max(i - 1, 0)], c_out, config.layers_per_block + 1, config, options, rngs=rngs
            )
            if i < len(outs) - 1:
                level.upsamplers = nnx.List([Upsample(c_out, options, rngs=rngs)])
            self.up_blocks.append(level)
        self.conv_norm_out = GroupNorm(outs[-1], config.norm_num_groups, EPS, options)
        self.conv_out = conv(outs[-1], config.out_channels, 3, options, rngs=rngs)

    def __call__(self, z: Array) -> Array:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class VAEEncoder(nnx.Module):
    """Pictures to the mean and log-variance of their latents."""

    def __init__(self, config: VAEConfig, options: Options, *, rngs: nnx.Rngs):
        self.config = config
        self.dtype = options.dtype
        self.encoder = _EncoderTrunk(config, options, rngs=rngs)
        if config.use_quant_conv:
            self.quant_conv = conv(
                2 * config.latent_channels, 2 * config.latent_channels, 1, options, rngs=rngs
            )

    def __call__(
        self, image_BxHxWxC: Float[Array, "B H W C"]
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """Encode pictures in [0, 1].

        Returns:
            Mean and log-variance of the normalised latents (what the U-Net sees), float32.
        """
        moments = self.encoder((2 * image_BxHxWxC - 1).astype(self.dtype))
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        offset, scale = _normalisation(self.config)
        logvar = jnp.clip(logvar, -30.0, 20.0) + 2 * jnp.log(scale)
        return (mean - offset) * scale, logvar


class VAEDecoder(nnx.Module):
    """The device's half: normalised latents to pictures, Eq. (20)."""

    def __init__(self, config: VAEConfig, options: Options, *, rngs: nnx.Rngs):
        self.config = config
        self.dtype = options.dtype
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(config.latent_channels, config.latent_channels, 1, options, rngs=rngs)
        self.decoder = _DecoderTrunk(config, options, rngs=rngs)

    def __call__(self, z_BxHxWxC: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Decode the U-Net's latents to pictures, float32, nominally in [0, 1] and not clipped."""
        offset, scale = _normalisation(self.config)
        z = (z_BxHxWxC.astype(jnp.float32) / scale + offset).astype(self.dtype)
        if hasattr(self, "post_quant_conv"):
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32) / 2 + 0.5


def _normalisation(config: VAEConfig) -> tuple[jax.Array, jax.Array]:
    """Offset and scale, each (1, 1, 1, c): z = (latent - offset) * scale."""
    shape = (1, 1, 1, config.latent_channels)
    mean = (
        jnp.zeros(shape)
        if config.latents_mean is None
        else jnp.reshape(jnp.array(config.latents_mean), shape)
    )
    return mean, jnp.reshape(jnp.array(latent_unit(config)), shape)


def latent_unit(config: VAEConfig) -> tuple[float, ...]:
    """Per channel, one unit of the raw latent in the normalised one: scaling_factor / std, 0.13 for SDXL."""
    std = config.latents_std or (1.0,) * config.latent_channels
    return tuple(config.scaling_factor / s for s in std)


def vae_encoder(config: VAEConfig, options: Options = Options()) -> Network:
    """The encoder as a function `(params, image) -> (mean, logvar)`; see `VAEEncoder.__call__`."""
    return network(VAEEncoder, config, options)


def vae_decoder(config: VAEConfig, options: Options = Options()) -> Network:
    """The decoder as a function `(params, z) -> image`; see `VAEDecoder.__call__`."""
    return network(VAEDecoder, config, options)
