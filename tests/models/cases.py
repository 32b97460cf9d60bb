"""Small configurations, random parameters and inputs that the models are compared on."""

import zlib
from pathlib import Path

import jax
import numpy as np

from megjax.models import CLIPTextConfig, UNetConfig, VAEConfig

REFERENCES = Path(__file__).parent / "references.npz"

UNETS = {
    # SDXL's own ratios: depth 1, 2, 10, heads of one size, two sizes of text encoder side by side.
    "sdxl_small": (
        UNetConfig(
            sample_size=16,
            block_out_channels=(32, 64, 128),
            attention_head_dim=(2, 4, 8),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=80,
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + 48,
            norm_num_groups=8,
        ),
        (16, 16),
    ),
    # Odd latents, 1 x 1 convolutions for projections, another embedding order, attention at full resolution.
    "odd": (
        UNetConfig(
            sample_size=13,
            block_out_channels=(24, 48),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(3, 6),
            transformer_layers_per_block=(2, 1),
            layers_per_block=1,
            cross_attention_dim=40,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
            norm_num_groups=6,
            norm_eps=1e-4,
            flip_sin_to_cos=False,
            freq_shift=1,
            use_linear_projection=False,
        ),
        (13, 11),
    ),
    "tiny_like": (
        UNetConfig(
            sample_size=16,
            block_out_channels=(48, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 3),
            transformer_layers_per_block=(1, 2),
            layers_per_block=1,
            cross_attention_dim=128,
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + 64,
            norm_num_groups=16,
        ),
        (16, 16),
    ),
}

VAES = {
    "sdxl_small": (VAEConfig(sample_size=64, block_out_channels=(16, 32, 64, 64), norm_num_groups=8), (8, 8)),
    "odd": (
        VAEConfig(
            sample_size=36,
            block_out_channels=(12, 24),
            layers_per_block=1,
            norm_num_groups=6,
            scaling_factor=0.7,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
        (9, 11),
    ),
    "normalised": (
        VAEConfig(
            sample_size=64,
            block_out_channels=(16, 24, 32),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=3,
            scaling_factor=0.5,
            latents_mean=(0.1, -0.2, 0.3),
            latents_std=(1.0, 2.0, 0.5),
        ),
        (8, 6),
    ),
}

_TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "max_position_embeddings": 20}
TEXTS = {
    "clip_l_small": CLIPTextConfig(vocab_size=99, num_hidden_layers=4, eos_token_id=2, **_TEXT),
    "bigg_small": CLIPTextConfig(
        vocab_size=99,
        num_hidden_layers=3,
        hidden_act="gelu",
        projection_dim=40,
        eos_token_id=98,
        with_projection=True,
        **_TEXT,
    ),
    "two_layers": CLIPTextConfig(
        vocab_size=50, num_hidden_layers=2, hidden_act="gelu", projection_dim=16, eos_token_id=49, **_TEXT
    ),
}

BLOCKS = {
    "unet/time_embedding": 1,
    "unet/down_blocks.0.resnets.0": 2,
    "unet/down_blocks.0.attentions.0": 2,
    "unet/down_blocks.0.attentions.0.transformer_blocks.1": 2,
    "unet/down_blocks.0.attentions.0.transformer_blocks.1.attn1": 1,
    "unet/down_blocks.0.attentions.0.transformer_blocks.1.attn2": 2,
    "unet/down_blocks.0.attentions.0.transformer_blocks.1.ff": 1,
    "unet/down_blocks.0.downsamplers.0": 1,
    "unet/mid_block.resnets.1": 2,
    "unet/up_blocks.0.upsamplers.0": 1,
    "vae/encoder.down_blocks.0": 1,
    "vae/encoder.down_blocks.0.downsamplers.0": 1,
    "vae/encoder.mid_block.attentions.0": 1,
    "vae/decoder.up_blocks.0": 1,
    "text/text_model.encoder.layers.1": 1,
    "text/text_model.encoder.layers.1.mlp": 1,
}
"""Blocks that are compared one by one, by PyTorch's names, and how many tensors each is given."""


def random_params(shapes):
    """Parameters drawn from each leaf's name, of the scale of trained ones."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
        if name.endswith("['kernel']"):
            # A stacked kernel's first axis is depth, not a fan-in.
            depth = leaf.shape[0] if "blocks'" in name or "layers'" in name else 1
            fan_in = np.prod(leaf.shape[:-1]) / depth
            values /= np.sqrt(max(fan_in, 1.0))
        elif name.endswith("['scale']"):
            values = 1.0 + 0.2 * values
        else:
            values *= 0.2
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def unet_inputs(config, size):
    """Batch of two: latents NHWC, timesteps, text, pooled text, sizes."""
    rng = np.random.default_rng(1)
    return (
        rng.standard_normal((2, *size, config.in_channels)).astype(np.float32),
        np.array([999, 21]),
        rng.standard_normal((2, 7, config.cross_attention_dim)).astype(np.float32),
        rng.standard_normal((2, config.pooled_dim)).astype(np.float32),
        np.array([[1024, 768, 0, 16, 1024, 1024], [64, 64, 0, 0, 64, 64]]),
    )


def vae_inputs(config, size):
    """Latents of two pictures and pictures of the size that they decode to, NHWC."""
    rng = np.random.default_rng(2)
    pixels = [n * config.downsampling for n in size]
    return (
        rng.standard_normal((2, *size, config.latent_channels)).astype(np.float32),
        rng.random((2, *pixels, 3), np.float32),
    )


def text_inputs(config):
    """Token ids of two texts that end at different places."""
    eos = config.vocab_size - 1
    ids = np.random.default_rng(3).integers(0, eos, (2, config.max_position_embeddings))
    ids[0, 7:] = eos
    ids[1, -1:] = eos
    return ids
