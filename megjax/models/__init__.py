"""SDXL's networks: Flax NNX inside, pure functions of parameter trees outside."""

from megjax.models.attention import TokenMerge
from megjax.models.clip import clip_text
from megjax.models.configs import CLIP_BIG_G, CLIPTextConfig, UNetConfig, VAEConfig, from_dict, read, to_dict
from megjax.models.layout import layout
from megjax.models.network import Network, Options, Params
from megjax.models.unet import time_ids, unet
from megjax.models.vae import latent_unit, vae_decoder, vae_encoder

__all__ = [
    "CLIP_BIG_G",
    "CLIPTextConfig",
    "Network",
    "Options",
    "Params",
    "TokenMerge",
    "UNetConfig",
    "VAEConfig",
    "clip_text",
    "from_dict",
    "latent_unit",
    "layout",
    "read",
    "time_ids",
    "to_dict",
    "unet",
    "vae_decoder",
    "vae_encoder",
]
