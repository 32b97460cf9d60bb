"""Small networks of every kind, as parameter trees filled with random numbers."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from megjax import models

CLIP = models.CLIPTextConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    projection_dim=16,
    eos_token_id=99,
)
CONFIGS = {
    "unet": models.UNetConfig(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        transformer_layers_per_block=(1, 3),
    ),
    "vae": models.VAEConfig(block_out_channels=(32, 64), layers_per_block=1),
    "text_encoder": CLIP,
    "text_encoder_2": dataclasses.replace(CLIP, with_projection=True),
}


class Component(NamedTuple):
    """A network's parameter tree, and what its config.json holds."""

    shapes: dict[str, Any]
    params: dict[str, Any]
    json: dict[str, Any]


@functools.cache
def shapes_of(config: Any) -> dict[str, Any]:
    if isinstance(config, models.VAEConfig):
        return models.vae_encoder(config).shapes | models.vae_decoder(config).shapes
    build = models.unet if isinstance(config, models.UNetConfig) else models.clip_text
    return build(config).shapes


def component(part: str, dtype: Any = jnp.float32, seed: int = 0, **changes: Any) -> Component:
    """A small component with random parameters; `changes` are to its config."""
    config = dataclasses.replace(CONFIGS[part], **changes)
    rng = np.random.default_rng(seed)
    shapes = shapes_of(config)
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32), dtype), shapes)
    return Component(shapes, params, models.to_dict(config))


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit by bit, dtypes included."""

    def bits(x: Any) -> tuple[Any, ...]:
        return np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()

    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(bits(x) == bits(y) for x, y in leaves)
