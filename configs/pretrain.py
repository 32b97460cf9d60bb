"""Presets of `python -m train.pretrain`.

`tiny` makes a backbone such as MEG-Tiny, the one in `megjax/assets/tiny`:

    python -m train.pretrain tiny --folder runs/tiny

On two CPU cores: 20 minutes for the autoencoder, 5 for the text encoders, 15 for the U-Net at high noise,
where the layout is decided, 70 at all noise, 10 for the decoder. It resumes. To go on from a finished one:
`--start runs/tiny/model --layout-steps 0 --coarse-steps 0 --folder runs/more`, since in the old folder all is
done. How the weights that ship were made stands beside them.
`python -m eval.backbone --model runs/tiny/model` then says how good it is.
"""

import dataclasses

from megjax.models import CLIPTextConfig, UNetConfig, VAEConfig
from megjax.training.pretrain import PretrainConfig

TEXT = CLIPTextConfig(
    vocab_size=661,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
    hidden_act="gelu",
    projection_dim=64,
    eos_token_id=660,
)

TINY = PretrainConfig(
    unet=UNetConfig(
        sample_size=16,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 3),
        cross_attention_dim=128,
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 64,
        norm_num_groups=16,
    ),
    vae=VAEConfig(
        sample_size=64,
        block_out_channels=(16, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
    ),
    text_encoder=TEXT,
    text_encoder_2=dataclasses.replace(TEXT, with_projection=True),
)

PRESETS = {"tiny": ("MEG-Tiny: 64 x 64 pictures, latents 4 x 16 x 16, two CPU cores.", TINY)}
