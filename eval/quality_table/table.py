"""A backbone's quality as a table, for training policies on it.

Pictures of fresh captions are denoised with every number of steps, sent at every ratio and PSNR, and decoded
by the device's decoder; the MSE against the clean reference (12 steps, nothing merged, perfect channel, the
undistilled decoder) goes into one .npz, which `megjax.rl.quality.load_table` reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from rich.progress import track

from eval.prompts import Prompts, draw, prompts_of, refuse_windows
from eval.suite.config import Dtype
from megjax.checks import within
from megjax.data.grammar import captions
from megjax.data.scenes import sample_scenes
from megjax.errors import MegError
from megjax.link.features import FeatureRules
from megjax.models import Params
from megjax.pipeline import Pipeline, Request, check
from megjax.pipeline.generate import REFERENCE_STEPS
from megjax.pipeline.split import decode, finite, noise_unit, send, unet_params
from megjax.rl.quality import QualitySource, Table, decoded_mse, make_table


@dataclasses.dataclass(frozen=True)
class QualityTableConfig:
    """What to measure."""

    model: str = "tiny"
    """An embedded backbone, or a folder in diffusers layout."""
    pictures: int = 48
    """Fresh captions of scenes, one picture each."""
    batch: int = 48
    """Pictures at a time."""
    steps: tuple[int, ...] = tuple(range(4, 13))
    ratios: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.875, 0.9375)
    psnrs_db: tuple[float, ...] = (5.0, 10.0, 15.0, 20.0)
    draws: int = 2
    """Of the partition and the noise for each entry; their log MSEs are averaged."""
    guidance: float = 2.5
    tome_ratio: float = 0.5
    """Of the tokens merged in the U-Net's self-attention; the reference's too under the rules `paper`."""
    rules: FeatureRules = "default"
    seed: int = 2024
    dtype: Dtype = "float32"
    """Of weights and activations."""
    output: Path = Path("quality.npz")


class Pictures(NamedTuple):
    """What is sent, and what it is compared with."""

    latents_TxPxHxWxC: Float[np.ndarray, "T P H W C"]
    reference_PxYxXx3: Float[np.ndarray, "P Y X 3"]


def refuse(pipeline: Pipeline, config: QualityTableConfig) -> None:
    """Refuse what cannot be measured as it would be recorded.

    Args:
        pipeline: to be measured.
        config: what to measure.

    Raises:
        MegError: an axis that is empty or does not increase, values that the pipeline does not run with, or
            no pictures or draws.
    """
    within(config, 1, math.inf, "pictures", "draws", "batch")
    for name in ("steps", "ratios", "psnrs_db"):
        axis = getattr(config, name)
        increasing = all(low < high for low, high in itertools.pairwise(axis))
        if not axis or not all(map(math.isfinite, axis)) or not increasing:
            raise MegError(f"{name} {axis}: finite numbers that increase are allowed, at least one")
    refuse_windows(pipeline, REFERENCE_STEPS)
    for end in (0, -1):
        request = Request(
            "",
            steps=config.steps[end],
            ratio=config.ratios[end],
            psnr_db=config.psnrs_db[end],
            guidance=config.guidance,
            seed=config.seed,
            rules=config.rules,
            tome_ratio=config.tome_ratio,
        )
        check(request, pipeline)


def pictures(pipeline: Pipeline, config: QualityTableConfig) -> Pictures:
    """Denoise every picture with every number of steps: one executable, one batch of pictures at a time.

    Raises:
        MegError: see `refuse`.
    """
    refuse(pipeline, config)
    key_scenes, key_noise = jax.random.split(jax.random.key(config.seed))
    texts = captions(sample_scenes(key_scenes, config.pictures, "all"))
    sampler, frozen = unet_params(pipeline)[1], pipeline.params["vae_decoder"]
    reference_tome = config.tome_ratio if config.rules == "paper" else 0.0
    latents, references = [], []
    for own in track(_batches(config), "denoising"):
        prompts = prompts_of(pipeline, texts[own], _key_of(key_noise, own))

        def z(steps: int, tome_ratio: float, prompts: Prompts = prompts) -> Array:
            return draw(pipeline, prompts, sampler, steps, config.guidance, tome_ratio)

        reference = decode(pipeline, frozen, z(REFERENCE_STEPS, reference_tome))
        references.append(finite(np.asarray(reference, np.float32)))
        latents.append(np.stack([np.asarray(z(T, config.tome_ratio), np.float32) for T in config.steps]))
    return Pictures(np.concatenate(latents, axis=1), np.concatenate(references))


def _batches(config: QualityTableConfig) -> list[slice]:
    return [slice(i, i + config.batch) for i in range(0, config.pictures, config.batch)]


def _key_of(key: PRNGKeyArray, own: slice) -> PRNGKeyArray:
    """A batch's key; the first's is the key itself, so that a table of one batch stays what it was."""
    return jax.random.fold_in(key, own.start) if own.start else key


def measure(pipeline: Pipeline, config: QualityTableConfig) -> Table:
    """Return the table of a backbone; the same pictures, partitions and noise for every entry."""
    sent = pictures(pipeline, config)
    unit = noise_unit(config.rules, pipeline.vae_decoder.config)
    levels = np.stack(np.meshgrid(config.ratios, config.psnrs_db, indexing="ij"), axis=-1).reshape(-1, 2)

    @jax.jit
    def log_mse(decoder: Params, z_PxHxWxC: Array, reference_PxYxXx3: Array, key: PRNGKeyArray) -> Array:
        """Return log MSE [ratio x PSNR, P] of one number of steps."""

        def at(level: Array) -> Array:
            received = send(key, z_PxHxWxC, level[0], level[1], rules=config.rules, unit=unit)
            shown = decode(pipeline, decoder, received.z_BxHxWxC)
            return jnp.log(jnp.mean((shown - reference_PxYxXx3) ** 2, axis=(1, 2, 3)))

        return jax.lax.map(at, jnp.asarray(levels, jnp.float32))

    def mean(z_PxHxWxC: np.ndarray, own: slice) -> np.ndarray:
        key = _key_of(jax.random.key(config.seed + 1), own)
        given = (pipeline.device_decoder, z_PxHxWxC[own], sent.reference_PxYxXx3[own])
        return np.mean([log_mse(*given, draw) for draw in jax.random.split(key, config.draws)], axis=0)

    rows = [
        np.concatenate([mean(z, own) for own in _batches(config)], axis=-1)
        for z in track(sent.latents_TxPxHxWxC, "sending")
    ]
    shape = (len(config.steps), len(config.ratios), len(config.psnrs_db), config.pictures)
    mse = np.exp(np.asarray(rows, float).reshape(shape)).transpose(3, 0, 1, 2)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "output"}
    about: dict[str, Any] = {"settings": settings, "sampler": unet_params(pipeline)[1]}
    about["weights_sha256"] = weights_hash(pipeline)
    return make_table(mse, config.steps, config.ratios, config.psnrs_db, about)


def live(pipeline: Pipeline, config: QualityTableConfig) -> QualitySource:
    """Return the same quality as a live source: the device's decoder runs inside the environment's step."""
    sent = pictures(pipeline, config)
    unit = noise_unit(config.rules, pipeline.vae_decoder.config)

    def receive(key: PRNGKeyArray, z: Array, ratio: Array, psnr_db: Array) -> Array:
        return send(key, z, ratio, psnr_db, rules=config.rules, unit=unit).z_BxHxWxC

    return decoded_mse(
        jnp.asarray(sent.latents_TxPxHxWxC.swapaxes(0, 1)),
        jnp.asarray(sent.reference_PxYxXx3),
        config.steps,
        receive,
        lambda z: decode(pipeline, pipeline.device_decoder, z),
    )


def weights_hash(pipeline: Pipeline) -> str:
    """Return a digest of every parameter: which backbone a table is of."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(pipeline.params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def summary(table: Table) -> str:
    """Return the mean log MSE, as MSE, at each number of steps and ratio at the PSNR nearest to 10 dB."""
    nearest = int(np.argmin(np.abs(table.psnrs_db - 10.0)))
    mean = np.exp(table.log_mse_PxTxRxS[..., nearest].mean(axis=0))
    lines = [f"MSE (geometric mean over pictures) at {table.psnrs_db[nearest]:g} dB; columns: ratio"]
    lines.append("  T " + " ".join(f"{ratio:8.4g}" for ratio in table.ratios))
    for steps, row in zip(table.steps, mean, strict=True):
        lines.append(f"{int(steps):3d} " + " ".join(f"{mse:8.5f}" for mse in row))
    return "\n".join(lines)
