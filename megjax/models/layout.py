"""A picture's coarse layout from its caption: a head to train the text encoders with, in no pipeline."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from megjax.models.attention import TransformerBlock
from megjax.models.configs import UNetConfig
from megjax.models.layers import linear
from megjax.models.network import Network, Options, network

_BLOCKS = 2


class LayoutConfig(NamedTuple):
    """Sizes of the head.

    Args:
        unet: that reads the same embeddings.
        pooled_size: values of a pooled embedding.
    """

    unet: UNetConfig
    pooled_size: int


class _Layout(nnx.Module):
    """One learned query a cell attends to the caption, as the U-Net's pixels do when all is noise."""

    def __init__(self, config: LayoutConfig, options: Options, *, rngs: nnx.Rngs):
        self.side, dim = config.unet.sample_size // 2, config.unet.cross_attention_dim
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (self.side**2, dim)))
        self.pooled = linear(config.pooled_size, dim, options, rngs=rngs)
        self.blocks = nnx.List(
            [TransformerBlock(dim, dim, 4, options, rngs=rngs) for _ in range(_BLOCKS)],
        )
        self.out = linear(dim, config.unet.in_channels, options, rngs=rngs)

    def __call__(
        self, context_BxSxE: Float[Array, "B S E"], pooled_BxP: Float[Array, "B P"]
    ) -> Float[Array, "B h w C"]:
        x = self.queries[...][None] + self.pooled(pooled_BxP)[:, None, :]
        for block in self.blocks:
            x = block(x, context_BxSxE)
        return self.out(x).reshape(len(x), self.side, self.side, -1)


def layout(config: UNetConfig, pooled_size: int, options: Options | None = None) -> Network:
    """The network from a caption's embeddings to latents of half the U-Net's side.

    Args:
        config: of the U-Net that reads the same embeddings.
        pooled_size: values of a pooled embedding.
        options: dtypes.
    """
    options = options or Options(dtype=jnp.float32)
    return network(_Layout, LayoutConfig(config, pooled_size), options)
