"""MEG-Tiny from nothing: autoencoder, then text encoders, then U-Net and text encoders, all on `scenes`."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from megjax.checks import LARGEST_SEED, within
from megjax.data.photos import load_photos, random_crops
from megjax.data.render import render
from megjax.data.scenes import sample_scenes
from megjax.data.tokenizer import token_ids, vocabulary, write_tokenizer
from megjax.diffusion import schedule
from megjax.errors import MegError
from megjax.files import replacing, writable_folder
from megjax.models import (
    CLIPTextConfig,
    Network,
    Params,
    UNetConfig,
    VAEConfig,
    clip_text,
    layout,
    unet,
    vae_decoder,
    vae_encoder,
)
from megjax.pipeline import load_pipeline
from megjax.pipeline.save import save_pipeline
from megjax.training.curves import draw_curves
from megjax.training.denoiser import COARSE, Captioned, Emphasis, denoiser_loss
from megjax.training.layout import layout_loss
from megjax.training.loop import fit
from megjax.training.optimizer import make_optimizer
from megjax.training.step import Loss, Metrics, TrainState, init_state, make_step
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
    start: Path | None = None
    """A finished backbone to go on from: its encoder stays, its decoder, U-Net and text encoders learn on."""
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
    layout_steps: int = 1500
    """Steps in which the text encoders learn, before the U-Net does, where a caption's things are; 0 to go on
    from a `start` that knows it."""
    layout_batch: int = 64
    layout_learning_rate: float = 2e-3
    coarse_steps: int = 1000
    """Steps of the U-Net and the text encoders at the highest noise alone, where the layout is decided; 0
    likewise."""
    steps: int = 4000
    """Of the U-Net's last stage."""
    batch: int = 64
    """Of the U-Net's stages, as the next."""
    learning_rate: float = 1e-3
    pool: int = 40960
    """Scenes whose latents are computed once for the U-Net; a multiple of 256."""
    two_objects: float = 0.7
    """Share of scenes with two objects: binding attributes to objects is what takes longest."""
    text_drop: float = 0.1
    max_weight: float = 10.0
    """Of a timestep in the loss, at most."""
    ema_decay: float = 0.999
    checkpoint_every: int = 200


POOL_BATCH = 256


def pretrain(config: PretrainConfig) -> Path:
    """Train all stages, each from its newest checkpoint in `config.folder`; returns the model's folder.

    Raises:
        MegError: a pool that is no multiple of 256, a seed out of range, no such `start`, no folder to write
            to; see `fit` and `draw_curves`.
    """
    if config.pool < 1 or config.pool % POOL_BATCH:
        raise MegError(f"pool {config.pool}: must be a positive multiple of {POOL_BATCH}")
    within(config, 0, LARGEST_SEED, "seed")
    writable_folder(config.folder, "folder")
    keys = jax.random.split(jax.random.key(config.seed), 5)
    key_vae, key_pool, key_denoiser, key_text, key_decoder = keys
    start = None
    if config.start is None:
        autoencoder = train_autoencoder(config, key_vae)
    else:
        finished = load_pipeline(config.start)
        start = finished.params
        config = dataclasses.replace(config, vae=finished.vae_decoder.config)
        autoencoder = {"encoder": start["vae_encoder"], "decoder": start["vae_decoder"]}
    pool = latent_pool(config, autoencoder["encoder"], key_pool)
    text = train_text_encoders(config, pool.data, key_text, start)
    denoiser = train_denoiser(config, pool.data, key_denoiser, (start or {}) | text)
    decoder = train_decoder(config, autoencoder, key_decoder)
    model = save_backbone(config, pool.vae, autoencoder, decoder, denoiser)
    stages = {
        "vae": config.vae_steps if config.start is None else 0,
        "text": config.layout_steps,
        "coarse": config.coarse_steps,
        "denoiser": config.steps,
        "decoder": config.decoder_steps,
    }
    if trained := tuple(name for name, steps in stages.items() if steps):
        draw_curves(config.folder, trained, model / "curves.png")
    return model


def train_autoencoder(config: PretrainConfig, key: Key[Array, ""]) -> Params:
    """Stage one; returns the averaged parameters, `{"encoder": ..., "decoder": ...}`."""
    encoder, decoder = vae_encoder(config.vae), vae_decoder(config.vae)
    key_encoder, key_decoder, key_run = jax.random.split(key, 3)
    params = {"encoder": encoder.init(key_encoder), "decoder": decoder.init(key_decoder)}
    loss = autoencoder_loss(encoder, decoder, config.kl_weight)
    return _fit_pictures(config, loss, params, key_run, config.vae_steps, "vae")


def train_decoder(config: PretrainConfig, autoencoder: Params, key: Key[Array, ""]) -> Params:
    """Stage four; returns the averaged parameters of the decoder, trained on alone for a frozen encoder."""
    loss = decoder_loss(vae_encoder(config.vae), vae_decoder(config.vae), autoencoder["encoder"])
    return _fit_pictures(config, loss, autoencoder["decoder"], key, config.decoder_steps, "decoder")


def _fit_pictures(
    config: PretrainConfig, loss: Loss, params: Params, key: Key[Array, ""], steps: int, name: str
) -> Params:
    """Train on scenes, rendered inside the step, and crops of photographs."""
    optimizer = make_optimizer(config.vae_learning_rate, steps, warmup=100)
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


class Pool(NamedTuple):
    """Normalised latents, their captions, and the config of the VAE that normalises so."""

    data: Captioned
    vae: VAEConfig


def latent_pool(config: PretrainConfig, encoder_params: Params, key: Key[Array, ""]) -> Pool:
    """Encode the scenes that the U-Net learns from, once: `latents.npz` keeps them, and what they depend on.

    They are normalised by their own statistics, unless the VAE's config already has some.
    """
    path = config.folder / "latents.npz"
    own = _pool_digest(config, encoder_params, key)
    if path.exists():
        with np.load(path) as stored:
            if "digest" in stored and stored["digest"] == own:
                return _normalised(config.vae, stored["latents"], stored["ids"])
    encoder = vae_encoder(config.vae)

    @jax.jit
    def encode(params: Params, key: Key[Array, ""]) -> tuple[Array, Array]:
        scenes = sample_scenes(key, POOL_BATCH, two_objects=config.two_objects)
        mean, _ = encoder(params, render(scenes, config.vae.sample_size))
        return mean, token_ids(scenes, config.text_encoder.max_position_embeddings)

    keys = [jax.random.fold_in(key, i) for i in range(config.pool // POOL_BATCH)]
    parts = [jax.device_get(encode(encoder_params, key)) for key in keys]
    latents, ids = (np.concatenate(part) for part in zip(*parts, strict=True))
    with replacing(path) as temporary:
        np.savez(temporary, latents=latents, ids=ids, digest=np.asarray(own))
    return _normalised(config.vae, latents, ids)


def _pool_digest(config: PretrainConfig, encoder_params: Params, key: Key[Array, ""]) -> str:
    length = config.text_encoder.max_position_embeddings
    found = hashlib.sha256(repr((config.pool, config.two_objects, length, config.vae)).encode())
    for leaf in jax.tree.leaves((jax.random.key_data(key), encoder_params)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _normalised(vae: VAEConfig, latents_NxHxWxC: np.ndarray, ids_NxL: np.ndarray) -> Pool:
    if vae.latents_mean is not None:
        return Pool(Captioned(jnp.asarray(latents_NxHxWxC, jnp.bfloat16), jnp.asarray(ids_NxL)), vae)
    mean: np.ndarray = latents_NxHxWxC.mean(axis=(0, 1, 2), dtype=np.float64)
    std: np.ndarray = latents_NxHxWxC.std(axis=(0, 1, 2), dtype=np.float64)
    z0 = ((latents_NxHxWxC - mean) / std).astype(np.float32)
    config = dataclasses.replace(
        vae, scaling_factor=1.0, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist())
    )
    return Pool(Captioned(jnp.asarray(z0, jnp.bfloat16), jnp.asarray(ids_NxL)), config)


def train_text_encoders(
    config: PretrainConfig, data: Captioned, key: Key[Array, ""], start: Params | None = None
) -> Params:
    """Stage two; returns the averaged parameters of `text_encoder` and `text_encoder_2`.

    Args:
        config: the networks and their training.
        data: from `latent_pool`.
        key: of the initial parameters and the run.
        start: parameters of the two to go on from, instead of random ones.
    """
    encoders = _text_encoders(config)
    networks = {**encoders, "layout": layout(config.unet, config.text_encoder_2.projection_dim)}
    key_init, key_run = jax.random.split(key)
    params = _init(networks, key_init) | {name: start[name] for name in encoders if start is not None}
    size = (config.vae.sample_size, config.vae.sample_size)
    loss = layout_loss(
        (networks["text_encoder"], networks["text_encoder_2"]),
        networks["layout"],
        size=size,
        batch=config.layout_batch,
    )
    optimizer = make_optimizer(config.layout_learning_rate, config.layout_steps, warmup=100)
    trained = _fit_latents(config, loss, optimizer, params, data, key_run, config.layout_steps, "text")
    return {name: trained[name] for name in encoders}


def _fit_latents(
    config: PretrainConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Params,
    data: Captioned,
    key: Key[Array, ""],
    steps: int,
    name: str,
) -> Params:
    """Train on the pool; the averaged parameters, or the given ones after no step at all."""
    if not steps:
        return params
    state = fit(
        make_step(loss, optimizer, config.ema_decay),
        init_state(params, optimizer),
        key=key,
        steps=steps,
        batch_at=lambda _: data,
        folder=config.folder,
        name=name,
        checkpoint_every=config.checkpoint_every,
    )
    return state.ema


def _text_encoders(config: PretrainConfig) -> dict[str, Network]:
    return {
        "text_encoder": clip_text(config.text_encoder),
        "text_encoder_2": clip_text(config.text_encoder_2),
    }


def _init(networks: dict[str, Network], key: Key[Array, ""]) -> Params:
    return {
        name: network.init(jax.random.fold_in(key, i)) for i, (name, network) in enumerate(networks.items())
    }


def train_denoiser(
    config: PretrainConfig, data: Captioned, key: Key[Array, ""], start: Params | None = None
) -> Params:
    """Stage three; returns the averaged parameters of `unet`, `text_encoder` and `text_encoder_2`.

    Args:
        config: the networks and their training.
        data: from `latent_pool`.
        key: of the initial parameters and the run.
        start: parameters to go on from, of those that are not to be random.
    """
    networks = {"unet": unet(config.unet), **_text_encoders(config)}
    key_init, key_coarse, key_run = jax.random.split(key, 3)
    params = _init(networks, key_init)
    # Predicting no noise at all is a calmer start than predicting noise of its own.
    params["unet"]["conv_out"] = jax.tree.map(jnp.zeros_like, params["unet"]["conv_out"])
    params |= {name: start[name] for name in params if start is not None and name in start}
    words, _ = vocabulary()
    first, last = words["<|startoftext|>"], words["<|endoftext|>"]
    length = config.text_encoder.max_position_embeddings

    def fit_denoiser(
        params: Params, key: Key[Array, ""], steps: int, emphasis: Emphasis, name: str
    ) -> Params:
        loss = denoiser_loss(
            networks["unet"],
            (networks["text_encoder"], networks["text_encoder_2"]),
            schedule(),
            size=(config.vae.sample_size, config.vae.sample_size),
            empty_L=jnp.array([first] + [last] * (length - 1)),
            text_drop=config.text_drop,
            batch=config.batch,
            emphasis=emphasis,
        )
        optimizer = make_optimizer(config.learning_rate, steps, warmup=200)
        return _fit_latents(config, loss, optimizer, params, data, key, steps, name)

    params = fit_denoiser(params, key_coarse, config.coarse_steps, COARSE, "coarse")
    return fit_denoiser(params, key_run, config.steps, Emphasis(max_weight=config.max_weight), "denoiser")


def save_backbone(
    config: PretrainConfig, vae: VAEConfig, autoencoder: Params, decoder: Params, denoiser: Params
) -> Path:
    """Write `folder/model` in diffusers layout, float16; returns its path.

    Args:
        config: what was trained.
        vae: the autoencoder's config with the latents' statistics, from `latent_pool`.
        autoencoder: of stage one.
        decoder: of stage four.
        denoiser: of stage three.
    """
    folder = config.folder / "model"
    save_pipeline(
        folder,
        {
            "text_encoder": config.text_encoder,
            "text_encoder_2": config.text_encoder_2,
            "unet": config.unet,
            "vae": vae,
        },
        {**denoiser, "vae_encoder": autoencoder["encoder"], "vae_decoder": decoder},
        schedule=schedule(spacing="trailing", offset=0),
        write_tokenizer=write_tokenizer,
        dtype=jnp.float16,
    )
    return folder
