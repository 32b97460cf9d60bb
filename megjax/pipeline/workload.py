"""What a frame costs in FLOPs, counted from the pipeline's own programs with no weight allocated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from megjax import flops
from megjax.link.cost import Workload
from megjax.merging import tome
from megjax.pipeline.load import Pipeline


@functools.lru_cache(maxsize=32)
def workload(
    pipeline: Pipeline, size: tuple[int, int], tome_ratio: float = 0.0, calls_per_step: int = 2
) -> Workload:
    """Count the FLOPs of one picture's text encoders, U-Net call, VAE encoder and decoder, Eqs. (1)-(3).

    Args:
        pipeline: whose programs are lowered and counted.
        size: height and width of the picture; pixels.
        tome_ratio: of the tokens merged inside the U-Net's self-attention.
        calls_per_step: see `megjax.link.cost.calls_per_step`.
    """
    vae, unet = pipeline.vae_decoder.config, pipeline.unet.config
    height, width = (n // vae.downsampling for n in size)

    def array(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    length = pipeline.text_encoders[0].config.max_position_embeddings
    text = sum(
        flops.count(encoder, encoder.shapes, array(1, length, dtype=jnp.int32)).flops
        for encoder in pipeline.text_encoders
    )
    token_merge = tome(tome_ratio, (height, width)) if tome_ratio else None
    call = flops.count(
        lambda *args: pipeline.unet(*args, token_merge),
        pipeline.unet.shapes,
        array(1, height, width, unet.in_channels),
        array(1),
        array(1, length, unet.cross_attention_dim),
        array(1, unet.pooled_dim),
        array(1, 6),
    ).flops
    encoder = pipeline.vae_encoder
    encoded = flops.count(encoder, encoder.shapes, array(1, *size, 3)).flops
    decoder = pipeline.thin.get("meg", pipeline.vae_decoder)
    decoded = flops.count(decoder, decoder.shapes, array(1, height, width, vae.latent_channels)).flops
    return Workload(text, encoded, call, calls_per_step, decoded)
