"""The stages that run the model: latents after T steps, and pictures through every method's link."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from eval.metrics import captions_right, mse, ssim
from eval.prompts import Prompts, draw
from eval.suite.config import MAX_STEPS, SuiteConfig
from eval.suite.context import Context, Stage, get
from eval.suite.methods import LABELS, TOME, Method, Name
from megjax.models import Params
from megjax.pipeline.split import decode, finite, unet_params

NOISE, AIR = 2, 3
"""Purposes of keys."""


def latents(config: SuiteConfig, steps: int, *, tome: bool) -> Stage:
    """Return the stage of every prompt's latent after T steps."""
    settings = {"steps": steps, "tome": config.tome if tome else 0.0, **drawn(config)}
    return Stage(f"latents, {steps} steps{', ToMe' if settings['tome'] else ''}", settings, _latents)


def sweep(
    config: SuiteConfig, name: Name, steps: int, levels: Sequence[float], psnrs_db: Sequence[float]
) -> Stage:
    """Return the stage of one method's MSE at levels of compression and of noise: `mse`, L x S x P."""
    settings = {
        "method": name,
        "levels": [float(level) for level in levels],
        "psnrs_db": [float(psnr_db) for psnr_db in psnrs_db],
        "rules": config.rules,
        **drawn(config),
    }
    label = f"{LABELS[name]}, {steps} steps, {len(levels)} ratios, {len(psnrs_db)} noise levels"
    return Stage(label, settings, _sweep, _latents_of(config, name, steps))


def pictures(config: SuiteConfig, name: Name, steps: int, level: float) -> Stage:
    """Return the stage of one method's pictures at one setting: every metric, and the first picture."""
    settings = {
        "method": name,
        "level": float(level),
        "psnr_db": config.feature_psnr_db,
        "rules": config.rules,
        **drawn(config),
    }
    label = f"{LABELS[name]}, {steps} steps, ratio {level:.4g}, pictures"
    return Stage(label, settings, _pictures, _latents_of(config, name, steps))


def reference(config: SuiteConfig) -> Stage:
    """Return the stage of the references' own metrics: captions, and what ToMe alone costs."""
    settings = {"rules": config.rules, **drawn(config)}
    both = (latents(config, MAX_STEPS, tome=False), latents(config, MAX_STEPS, tome=True))
    return Stage("references", settings, _reference, both)


def chosen(config: SuiteConfig, label: str, policy: Stage) -> Stage:
    """Return the stage of MEG's MSE where `policy` gives each picture its own `steps` and `ratios`."""
    settings = {"psnr_db": config.feature_psnr_db, "rules": config.rules, **drawn(config)}
    needs = (policy, _reference_latents(config))
    return Stage(f"{label}, pictures", settings, _chosen, needs)


def drawn(config: SuiteConfig) -> dict[str, Any]:
    """Return what decides the prompts, the noise and the model's arithmetic."""
    prompts = None if config.prompts is None else config.prompts.read_text()
    names = ("pictures", "batch", "seed", "sample", "guidance", "dtype")
    return {"prompts": prompts, **{name: getattr(config, name) for name in names}}


def _latents_of(config: SuiteConfig, name: Name, steps: int) -> tuple[Stage, Stage]:
    return latents(config, steps, tome=TOME[name]), _reference_latents(config)


def _reference_latents(config: SuiteConfig) -> Stage:
    # The authors have ToMe on in their reference too.
    return latents(config, MAX_STEPS, tome=config.rules == "paper")


def _latents(context: Context, settings: Mapping[str, Any]) -> dict[str, Any]:
    pipeline, batch = context.pipeline, context.config.batch
    sampler = unet_params(pipeline)[1]
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    noise = jax.vmap(lambda key: jax.random.normal(key, (side, side, channels), jnp.float32))(
        context.keys(NOISE)
    )
    parts = []
    for i, (prompt, empty) in enumerate(context.conditioning):
        own = noise[i * batch : (i + 1) * batch]
        prompts = Prompts((), prompt, empty, own)
        z = draw(pipeline, prompts, sampler, settings["steps"], settings["guidance"], settings["tome"])
        parts.append(np.asarray(z, np.float32))
    return {"z": np.concatenate(parts)}


def _sweep(context: Context, settings: Mapping[str, Any], own: Any, clean: Any) -> dict[str, Any]:
    references = _references(context, clean["z"])
    errors = [
        [
            mse(_through(context, context.method(settings["method"]), own["z"], level, psnr_db), references)
            for psnr_db in settings["psnrs_db"]
        ]
        for level in settings["levels"]
    ]
    return {"mse": np.asarray(errors)}


def _pictures(context: Context, settings: Mapping[str, Any], own: Any, clean: Any) -> dict[str, Any]:
    method = context.method(settings["method"])
    images = _through(context, method, own["z"], settings["level"], settings["psnr_db"])
    return _metrics(context, images, _references(context, clean["z"]))


def _reference(context: Context, settings: Mapping[str, Any], plain: Any, merged: Any) -> dict[str, Any]:
    frozen = context.pipeline.params["vae_decoder"]
    images = _decode(context, frozen, plain["z"]), _decode(context, frozen, merged["z"])
    clean = images[settings["rules"] == "paper"]
    return _metrics(context, clean, clean) | {"tome_mse": mse(images[1], images[0]), "images": clean}


def _chosen(context: Context, settings: Mapping[str, Any], policy: Any, clean: Any) -> dict[str, Any]:
    """Each picture with the steps that the policy chose: those with equal T share their latents' stage."""
    z_PxHxWxC = np.empty_like(clean["z"])
    steps_P, ratio_P = np.asarray(policy["steps"]), np.asarray(policy["ratios"])
    for steps in np.unique(steps_P):
        found = get(context, latents(context.config, int(steps), tome=True))["z"]
        z_PxHxWxC[steps_P == steps] = found[steps_P == steps]
    images = _through(context, context.method("meg"), z_PxHxWxC, ratio_P, settings["psnr_db"])
    return {"mse": mse(images, _references(context, clean["z"]))}


def _metrics(context: Context, images: np.ndarray, references: np.ndarray) -> dict[str, Any]:
    right = captions_right(images, context.prompts)
    return {
        "mse": mse(images, references),
        "ssim": ssim(images, references),
        "captions": None if right is None else right.astype(np.float64),
        "first": np.round(images[0] * 255).astype(np.uint8),
    }


def _references(context: Context, z_PxHxWxC: np.ndarray) -> np.ndarray:
    """Return the clean references: the undistilled decoder on a perfect channel."""
    key = "references " + context.config.rules
    if key not in context.done:
        images = _decode(context, context.pipeline.params["vae_decoder"], z_PxHxWxC)
        context.done[key] = {"images": images}
    return context.done[key]["images"]


def _through(
    context: Context, method: Method, z_PxHxWxC: np.ndarray, level: Any, psnr_db: float
) -> Float[np.ndarray, "P H W 3"]:
    """Return what the device shows of latents sent by a method at a level, one for all or one a picture."""
    level_P = np.broadcast_to(np.float32(level), len(z_PxHxWxC))
    keys, batch, noise = context.keys(AIR), context.config.batch, jnp.asarray(psnr_db, jnp.float32)
    parts = []
    for i in range(0, len(z_PxHxWxC), batch):
        own = slice(i, i + batch)
        received = _sent(method.send)(
            keys[own], jnp.asarray(z_PxHxWxC[own]), jnp.asarray(level_P[own]), noise
        )
        parts.append(decode(context.pipeline, method.decoder, received))
    return finite(np.concatenate([np.asarray(part, np.float32) for part in parts]))


@functools.cache
def _sent(send: Any) -> Any:
    """Return a method's way over the air for a batch of pictures, compiled once for all levels."""
    return jax.jit(jax.vmap(send, (0, 0, 0, None)))


def _decode(context: Context, params: Params, z_PxHxWxC: np.ndarray) -> Float[np.ndarray, "P H W 3"]:
    batch = context.config.batch
    starts = range(0, len(z_PxHxWxC), batch)
    parts = [decode(context.pipeline, params, jnp.asarray(z_PxHxWxC[i : i + batch])) for i in starts]
    return finite(np.concatenate([np.asarray(part, np.float32) for part in parts]))
