"""A backbone small enough to train and run in a test, with the vocabulary of `scenes`."""

import dataclasses

import jax.numpy as jnp

from megjax.data.tokenizer import write_tokenizer
from megjax.diffusion import schedule
from megjax.models import CLIPTextConfig, UNetConfig, VAEConfig, clip_text, unet, vae_decoder, vae_encoder
from megjax.pipeline.save import save_pipeline
from megjax.training.pretrain import PretrainConfig
from tests.models.cases import random_params

_TEXT = CLIPTextConfig(
    vocab_size=661,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    hidden_act="gelu",
    projection_dim=16,
    eos_token_id=660,
)

CONFIG = PretrainConfig(
    unet=UNetConfig(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 2),
        cross_attention_dim=32,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=4,
    ),
    vae=VAEConfig(
        sample_size=64,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
    ),
    text_encoder=_TEXT,
    text_encoder_2=dataclasses.replace(_TEXT, with_projection=True),
    vae_steps=4,
    decoder_steps=2,
    layout_steps=2,
    coarse_steps=2,
    layout_batch=4,
    vae_scenes=3,
    vae_crops=1,
    steps=4,
    batch=4,
    pool=256,
    checkpoint_every=2,
)


def save_random(folder, config=CONFIG):
    """Write an untrained backbone in diffusers layout; returns its folder."""
    networks = {
        "text_encoder": clip_text(config.text_encoder),
        "text_encoder_2": clip_text(config.text_encoder_2),
        "unet": unet(config.unet),
        "vae_encoder": vae_encoder(config.vae),
        "vae_decoder": vae_decoder(config.vae),
    }
    # Compiling what initialises them would take most of a test's time.
    params = {name: random_params(net.shapes) for name, net in networks.items()}
    configs = {
        "text_encoder": config.text_encoder,
        "text_encoder_2": config.text_encoder_2,
        "unet": config.unet,
        "vae": config.vae,
    }
    save_pipeline(
        folder,
        configs,
        params,
        schedule=schedule(spacing="trailing", offset=0),
        write_tokenizer=write_tokenizer,
        dtype=jnp.float32,
    )
    return folder
