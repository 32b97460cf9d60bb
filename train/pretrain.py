"""`python -m train.pretrain tiny`: train a small backbone from nothing on `scenes`."""

from __future__ import annotations

import dataclasses

import jax
import tyro

from configs.pretrain import PRESETS
from megjax.allocator import keep_freed_memory
from megjax.compilation import keep_compilations
from megjax.pipeline import load_pipeline
from megjax.training.curves import draw_curves
from megjax.training.pretrain import (
    PretrainConfig,
    latent_pool,
    save_backbone,
    train_autoencoder,
    train_decoder,
    train_denoiser,
    train_text_encoders,
)


def main(config: PretrainConfig) -> None:
    """Train all stages; each resumes from its newest checkpoint in `config.folder`."""
    keep_freed_memory()
    keep_compilations()
    config.folder.mkdir(parents=True, exist_ok=True)
    key_vae, key_pool, key_denoiser = jax.random.split(jax.random.key(config.seed), 3)
    start = None
    stages = {
        "vae": config.vae_steps if config.start is None else 0,
        "text": config.layout_steps,
        "coarse": config.coarse_steps,
        "denoiser": config.steps,
        "decoder": config.decoder_steps,
    }
    if config.start is None:
        autoencoder = train_autoencoder(config, key_vae)
    else:
        finished = load_pipeline(config.start)
        start = finished.params
        config = dataclasses.replace(config, vae=finished.vae_decoder.config)
        autoencoder = {"encoder": start["vae_encoder"], "decoder": start["vae_decoder"]}
    pool = latent_pool(config, autoencoder["encoder"], key_pool)
    text = train_text_encoders(config, pool.data, jax.random.fold_in(key_denoiser, 1), start)
    denoiser = train_denoiser(config, pool.data, key_denoiser, (start or {}) | text)
    decoder = train_decoder(config, autoencoder, jax.random.fold_in(key_vae, 1))
    model = save_backbone(config, pool.vae, autoencoder, decoder, denoiser)
    trained = tuple(name for name, steps in stages.items() if steps)
    draw_curves(config.folder, trained, model / "curves.png")
    print(model)


if __name__ == "__main__":
    main(tyro.extras.overridable_config_cli(PRESETS))
