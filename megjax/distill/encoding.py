"""What distillation learns from, computed once: latents, captions' embeddings, a student's samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megjax.data.loader import Broken, DataConfig, Example, data_key, open_pictures
from megjax.data.pictures import to_uint8
from megjax.diffusion import Conditioning
from megjax.distill.cache import Block, Cache, cached, fingerprint
from megjax.errors import MegError
from megjax.pipeline.load import STUDENT, Pipeline, open_backbone
from megjax.pipeline.split import condition, decode, denoise, encode, unet_params
from megjax.training.logs import SPEED_OVER_S
from megjax.training.sharding import batch_sharding, make_mesh, replicated

STEPS = tuple(range(4, 13))
"""T: a decoder learns from the latents after each of these that the student takes."""

STORED = np.float16


Arrays = Callable[[Sequence[Example], Sequence[int]], dict[str, Any]]
"""(examples, their numbers) -> what is kept of them, a row each."""

ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")


def encoded_pictures(
    pipeline: Pipeline, data: DataConfig, folder: Path, batch: int, preset: Mapping[str, Any]
) -> Cache:
    """Latents and text embeddings of captioned pictures: rows of `z0`, `text` and `pooled`.

    Args:
        pipeline: whose encoders run.
        data: which pictures.
        folder: of all caches.
        batch: pictures at a time.
        preset: whatever else the result depends on, such as the pipeline's dtype.
    """
    params = on_each_device(
        {name: pipeline.params[name] for name in ("text_encoder", "text_encoder_2", "vae_encoder")}
    )

    def arrays(examples: Sequence[Example], numbers: Sequence[int]) -> dict[str, Any]:
        del numbers
        image = np.stack([example.image_SxSx3 for example in examples]).astype(np.float32) / 255
        z0 = encode(pipeline, params["vae_encoder"], over_devices(image))
        text, pooled, _ = _condition(pipeline, params, [example.caption for example in examples])
        return {"z0": z0, "text": text, "pooled": pooled}

    key = {"kind": "pictures", "preset": dict(preset), "model": model_key(pipeline, ENCODERS)}
    return _build(pipeline, folder, key, data, batch, arrays)


def encoded_latents(
    pipeline: Pipeline, data: DataConfig, folder: Path, batch: int, preset: Mapping[str, Any]
) -> Cache:
    """Rows as `sampled_latents` gives them, with pictures' own latents for samples: no U-Net runs.

    Args:
        pipeline: whose autoencoder runs.
        data: which pictures.
        folder: of all caches.
        batch: pictures at a time.
        preset: see `encoded_pictures`.
    """
    params = on_each_device({name: pipeline.params[name] for name in ("vae_encoder", "vae_decoder")})

    def arrays(examples: Sequence[Example], numbers: Sequence[int]) -> dict[str, Any]:
        del numbers
        image = np.stack([example.image_SxSx3 for example in examples]).astype(np.float32) / 255
        z = encode(pipeline, params["vae_encoder"], over_devices(image))
        picture = decode(pipeline, params["vae_decoder"], z)
        return {"z": np.asarray(z)[:, None], "picture": _bytes("picture", np.asarray(picture))}

    key = {"kind": "latents", "preset": dict(preset), "model": model_key(pipeline, ("vae",))}
    return _build(pipeline, folder, key, data, batch, arrays)


def sampled_latents(
    pipeline: Pipeline,
    data: DataConfig,
    folder: Path,
    batch: int,
    preset: Mapping[str, Any],
    *,
    guidance: float,
    seed: int,
) -> Cache:
    """Latents of captions after every number of steps: rows of `z` (T, H, W, C) and `picture`.

    The picture is that of the longest run through the frozen decoder, in bytes: the reference, y_ref.

    Args:
        pipeline: with a few-step student, which takes those of `STEPS` that are no fewer than its windows;
            without one its teacher is sampled by DDIM.
        data: whose captions.
        folder: of all caches.
        batch: captions at a time.
        preset: see `encoded_pictures`.
        guidance: of the sampler.
        seed: of the noise; each caption has its own, the same for every number of steps.

    Raises:
        MegError: a student of more windows than the most steps; see `cached` and `open_pictures`.
    """
    unet, sampler = unet_params(pipeline)
    numbers_of_steps = [T for T in STEPS if sampler != "perflow" or pipeline.flow.windows <= T]
    if not numbers_of_steps:
        raise MegError(
            f"{pipeline.name}: its student has {pipeline.flow.windows} windows, decoders learn from at most "
            f"{STEPS[-1]} steps; take a student of fewer windows"
        )
    names = ("text_encoder", "text_encoder_2", "vae_decoder")
    params = on_each_device({"unet": unet, **{name: pipeline.params[name] for name in names}})
    config, size = pipeline.vae_decoder.config, pipeline.image_size
    shape = (size // config.downsampling, size // config.downsampling, config.latent_channels)
    noise_of = jax.jit(
        jax.vmap(lambda n: jax.random.normal(jax.random.fold_in(jax.random.key(seed), n), shape, jnp.float32))
    )

    def arrays(examples: Sequence[Example], numbers: Sequence[int]) -> dict[str, Any]:
        prompt = _condition(pipeline, params, [example.caption for example in examples])
        empty = _condition(pipeline, params, [""] * len(examples))
        noise = over_devices(np.asarray(noise_of(np.asarray(numbers))))
        start = over_devices(np.zeros(noise.shape, np.float32))
        z = [
            denoise(
                pipeline, params["unet"], noise, prompt, empty, steps, guidance, start, 1.0, sampler=sampler
            )
            for steps in numbers_of_steps
        ]
        picture = decode(pipeline, params["vae_decoder"], z[-1])
        return {
            "z": np.stack([np.asarray(z_T) for z_T in z], axis=1),
            "picture": _bytes("picture", np.asarray(picture)),
        }

    parts = (*ENCODERS, "scheduler", STUDENT if sampler == "perflow" else "unet")
    key = {"kind": "samples", "preset": dict(preset), "model": model_key(pipeline, parts)}
    key |= {"sampler": sampler, "guidance": guidance, "seed": seed, "steps": numbers_of_steps}
    return _build(pipeline, folder, key, data, batch, arrays)


def model_key(pipeline: Pipeline, parts: Sequence[str]) -> dict[str, str]:
    """Fingerprints of a backbone's parts."""
    path = open_backbone(pipeline.name).path
    return {part: fingerprint(path / part) for part in parts if (path / part).is_dir()}


def caption_ids(
    pipeline: Pipeline, captions: Sequence[str]
) -> tuple[Int[np.ndarray, "encoders batch length"], int]:
    """Token ids for each text encoder, as `megjax.text.tokenize` gives them, and how many captions were cut.

    Captions of data sets are often longer than the encoders read; what somebody typed is refused instead.
    """
    ids, cut = [], 0
    for tokenizer in pipeline.tokenizers:
        limit, end, pad = tokenizer.model_max_length, tokenizer.eos_token_id, tokenizer.pad_token_id
        rows = tokenizer(list(captions), padding=False, truncation=False, verbose=False)["input_ids"]
        cut = sum(len(row) > limit for row in rows)
        rows = [row if len(row) <= limit else [*row[: limit - 1], end] for row in rows]
        ids.append([row + [pad] * (limit - len(row)) for row in rows])
    return np.asarray(ids, np.int32), cut


def _condition(pipeline: Pipeline, params: Any, captions: Sequence[str]) -> Conditioning:
    ids_2xBxL, _ = caption_ids(pipeline, captions)
    size = (pipeline.image_size, pipeline.image_size)
    return condition(pipeline, params, over_devices(ids_2xBxL, axis=1), size=size)


def _build(
    pipeline: Pipeline, folder: Path, key: Mapping[str, Any], data: DataConfig, batch: int, arrays: Arrays
) -> Cache:
    """Read, compute and store whatever is missing, with a progress bar."""
    size = pipeline.image_size
    pictures = open_pictures(data, size)
    batch = whole_batch(batch)
    shard = min(1024, max(16, 2**28 // (3 * size * size)))  # at most 256 MiB of pixels
    key = {**key, "data": data_key(data), "size": size, "shard": shard}

    with progress_bar(str(key["kind"]), pictures.count) as (say, progress):

        def compute(start: int, stop: int) -> Block:
            found = pictures.read(start, stop)
            whole = [(start + i, example) for i, example in enumerate(found) if isinstance(example, Example)]
            broken = [f"{example.name}: {example.reason}" for example in found if isinstance(example, Broken)]
            if whole and (cut := caption_ids(pipeline, [example.caption for _, example in whole])[1]):
                say(f"examples {start} to {stop}: {cut} captions are longer than the text encoders read; cut")
            blocks: list[dict[str, np.ndarray]] = []
            for at in range(0, len(whole), batch):
                some = whole[at : at + batch]
                # Always the same shape, so that one executable serves all.
                numbers, examples = zip(*some, *[some[-1]] * (batch - len(some)), strict=True)
                computed = {name: np.asarray(x)[: len(some)] for name, x in arrays(examples, numbers).items()}
                blocks.append({name: stored(name, array) for name, array in computed.items()})
            joined = {
                name: np.concatenate([block[name] for block in blocks])
                for name in (blocks[0] if blocks else ())
            }
            return Block(joined, broken)

        return cached(
            folder,
            key,
            pictures.count,
            compute,
            say=say,
            progress=progress,
            max_broken=data.max_broken,
            shard=shard,
        )


def stored(name: str, array: np.ndarray) -> np.ndarray:
    """Bytes as they are, numbers in `STORED`; raises `MegError` if one is not finite there."""
    if array.dtype == np.uint8:
        return array
    with np.errstate(over="ignore"):
        return _finite(name, array.astype(STORED))


def _bytes(name: str, array: np.ndarray) -> np.ndarray:
    """What lies in [0, 1], in bytes, where a NaN would be a 0."""
    return to_uint8(_finite(name, array))


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise MegError(f"{name}: not finite in {array.dtype}; compute in another --dtype")
    return array


@contextlib.contextmanager
def progress_bar(name: str, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """A bar on process 0, and a function that prints a line above it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = jax.process_index() != 0
    with Progress(*columns, console=console, disable=hidden, speed_estimate_period=SPEED_OVER_S) as bar:
        task = bar.add_task(name, total=total)
        yield (
            lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True),
            lambda done: bar.update(task, completed=done),
        )


def whole_batch(batch: int) -> int:
    """The batch, or the next that this process's devices share evenly."""
    devices = jax.local_device_count()
    return -(-batch // devices) * devices


def on_each_device(params: Any) -> Any:
    """Copy parameters to each of this process's devices."""
    if jax.local_device_count() == 1:
        return params
    return jax.device_put(params, replicated(make_mesh(devices=jax.local_devices())))


def over_devices(array: np.ndarray, axis: int = 0) -> Array:
    """Cut a batch over this process's devices."""
    if jax.local_device_count() == 1:
        return jnp.asarray(array)
    sharding = batch_sharding(make_mesh(devices=jax.local_devices()))
    spec = PartitionSpec(*[None] * axis, *sharding.spec)
    return jax.device_put(array, NamedSharding(sharding.mesh, spec))
