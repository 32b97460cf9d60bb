"""MEG-Tiny from nothing: autoencoder first, then U-Net and text encoders on its latents, all on `scenes`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from megjax.data.photos import load_photos, random_crops
from megjax.data.render import render
from megjax.data.scenes import sample_scenes
from megjax.data.tokenizer import token_ids, vocabulary
from megjax.diffusion import schedule
from megjax.models import (
    CLIPTextConfig,
    Params,
    UNetConfig,
    VAEConfig,
    clip_text,
    unet,
    vae_decoder,
    vae_encoder,
)
from megjax.training.denoiser import Captioned, denoiser_loss
from megjax.training.loop import fit
from megjax.training.step import Loss, Metrics, TrainState, adamw, init_state, make_step
from megjax.training.vae import autoencoder_loss, decoder_loss


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """What to train and for how long."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig
    folder: Path = Path("runs/pretrain")
    """Where checkpoints, logs and the finished model go."""
    stages: tuple[Literal["decoder", "denoiser"], ...] = ("decoder", "denoiser")
    """What to train after the autoencoder: neither needs the other, so two processes may share the work."""
    seed: int = 0
    vae_steps: int = 1800
    decoder_steps: int = 4000
    """Further steps of the decoder alone."""
    vae_scenes: int = 12
    """Scenes in a batch of the autoencoder."""
    vae_crops: int = 4
    """Crops of photographs in a batch of the autoencoder."""
    vae_learning_rate: float = 2e-3
    kl_weight: float = 1e-6
    steps: int = 4000
    batch: int = 64
    learning_rate: float = 1e-3
    pool: int = 40960
    """Scenes whose latents are computed once for the U-Net."""
    two_objects: float = 0.7
    """Share of scenes with two objects: binding attributes to objects is what takes longest."""
    text_drop: float = 0.1
    ema_decay: float = 0.999
    checkpoint_every: int = 200


def train_autoencoder(config: PretrainConfig, key: Key[Array, ""]) -> Params:
    """Stage one; returns the averaged parameters, `{"encoder": ..., "decoder": ...}`."""
    encoder, decoder = vae_encoder(config.vae), vae_decoder(config.vae)
    key_encoder, key_decoder, key_run = jax.random.split(key, 3)
    params = {"encoder": encoder.init(key_encoder), "decoder": decoder.init(key_decoder)}
    loss = autoencoder_loss(encoder, decoder, config.kl_weight)
    return _fit_pictures(config, loss, params, key_run, config.vae_steps, "vae")


def train_decoder(config: PretrainConfig, autoencoder: Params, key: Key[Array, ""]) -> Params:
    """Stage one and a half: the decoder goes on alone, while the U-Net may already learn the encoder's latents."""
    loss = decoder_loss(vae_encoder(config.vae), vae_decoder(config.vae), autoencoder["encoder"])
    return _fit_pictures(config, loss, autoencoder["decoder"], key, config.decoder_steps, "decoder")


def _fit_pictures(
    config: PretrainConfig, loss: Loss, params: Params, key: Key[Array, ""], steps: int, name: str
) -> Params:
    """Train on scenes, rendered inside the step, and crops of photographs."""
    optimizer = adamw(config.vae_learning_rate, steps, warmup=100)
    step = make_step(loss, optimizer, config.ema_decay)

    def step_on_scenes(state: TrainState, key: Key[Array, ""], crops: Array) -> tuple[TrainState, Metrics]:
        key_scenes = jax.random.fold_in(jax.random.fold_in(key, state.step), 1)
        scenes = render(sample_scenes(key_scenes, config.vae_scenes), config.vae.sample_size)
        return step(state, key, jnp.concatenate([scenes, crops]))

    photos = load_photos()

    def crops_at(i: int) -> np.ndarray:
        rng = np.random.default_rng((config.seed, i))
        return random_crops(photos, rng, config.vae_crops, config.vae.sample_size)

    state = fit(
        step_on_scenes,
        init_state(params, optimizer),
        key=key,
        steps=steps,
        batch_at=crops_at,
        folder=config.folder,
        name=name,
        checkpoint_every=config.checkpoint_every,
    )
    return state.ema


def latent_pool(
    config: PretrainConfig, encoder_params: Params, key: Key[Array, ""]
) -> tuple[Captioned, VAEConfig]:
    """Encode the pool of scenes; returns normalised latents and captions, and the config that normalises so."""
    encoder = vae_encoder(config.vae)

    @jax.jit
    def encode(params: Params, key: Key[Array, ""]) -> Captioned:
        scenes = sample_scenes(key, 256, two_objects=config.two_objects)
        mean, _ = encoder(params, render(scenes, config.vae.sample_size))
        return Captioned(mean, token_ids(scenes, config.text_encoder.max_position_embeddings))

    keys = [jax.random.fold_in(key, i) for i in range(config.pool // 256)]
    parts = [encode(encoder_params, k) for k in keys]
    data = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    mean, std = (f(data.z0_NxHxWxC, axis=(0, 1, 2)) for f in (jnp.mean, jnp.std))
    normalised = ((data.z0_NxHxWxC - mean[None, None, None]) / std[None, None, None]).astype(jnp.bfloat16)
    vae = dataclasses.replace(
        config.vae, scaling_factor=1.0, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist())
    )
    return Captioned(normalised, data.ids_NxL), vae


def train_denoiser(config: PretrainConfig, data: Captioned, key: Key[Array, ""]) -> Params:
    """Stage two; returns the averaged parameters of `unet`, `text_encoder` and `text_encoder_2`."""
    networks = {
        "unet": unet(config.unet),
        "text_encoder": clip_text(config.text_encoder),
        "text_encoder_2": clip_text(config.text_encoder_2),
    }
    key_init, key_run = jax.random.split(key)
    params = {
        name: network.init(jax.random.fold_in(key_init, i))
        for i, (name, network) in enumerate(networks.items())
    }
    # Predicting no noise at all is a calmer start than predicting noise of its own.
    params["unet"]["conv_out"] = jax.tree.map(jnp.zeros_like, params["unet"]["conv_out"])
    words, _ = vocabulary()
    start, end = words["<|startoftext|>"], words["<|endoftext|>"]
    length = config.text_encoder.max_position_embeddings
    loss = denoiser_loss(
        networks["unet"],
        (networks["text_encoder"], networks["text_encoder_2"]),
        schedule(),
        size=(config.vae.sample_size,) * 2,
        empty_L=jnp.array([start] + [end] * (length - 1)),
        text_drop=config.text_drop,
        batch=config.batch,
    )
    optimizer = adamw(config.learning_rate, config.steps, warmup=200)
    state = fit(
        make_step(loss, optimizer, config.ema_decay),
        init_state(params, optimizer),
        key=key_run,
        steps=config.steps,
        batch_at=lambda _: data,
        folder=config.folder,
        name="denoiser",
        checkpoint_every=config.checkpoint_every,
    )
    return state.ema
