"""The server's half as compiled batches: prompts in, one message a picture out.

Steps, ratio, guidance and seed are of each row, and traced. No row's message depends on the others, nor on
its place: the same request in a batch of the same size is the same message, bit for bit.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from megjax import merging
from megjax.diffusion import Conditioning
from megjax.errors import MegError
from megjax.link import counts, wire
from megjax.link.counts import Grid
from megjax.link.payload import payload_bits
from megjax.models import Params
from megjax.pipeline import Pipeline, Request, check
from megjax.pipeline.generate import MAX_RATIO, picture_size
from megjax.pipeline.split import condition, denoise, request_keys, unet_params
from megjax.text import tokenize

Size = tuple[int, int]
"""Height and width of a picture; pixels."""


@dataclass(frozen=True, eq=False)
class Task:
    """One picture to generate, checked: what its message depends on.

    Args:
        ids_2x2xL: token ids for each encoder, of the prompt and of the negative prompt.
        size: of the picture.
        seed: of the noise and the partition.
        steps: T; None until a policy has chosen.
        ratio: r; likewise.
        guidance: of classifier-free guidance.
        dtype: how a scalar travels.
    """

    ids_2x2xL: Int[np.ndarray, "2 2 L"]
    size: Size
    seed: int
    steps: int | None
    ratio: float | None
    guidance: float
    dtype: wire.WireDtype


class Sent(NamedTuple):
    """A message and what it says.

    Args:
        message: in the wire format.
        tokens: N - R.
        payload_bits: of its body, what the latency model charges.
    """

    message: bytes
    tokens: int
    payload_bits: int


class Times(NamedTuple):
    """Seconds that a batch took, part by part."""

    text_s: float = 0.0
    denoise_s: float = 0.0
    merge_s: float = 0.0


def prepare(pipeline: Pipeline, request: Request, dtype: wire.WireDtype, *, chosen: bool = True) -> Task:
    """Check a request and look its words up; no program runs.

    Args:
        pipeline: the backbone.
        request: what to generate; `psnr_db` is the device's affair.
        dtype: how a scalar travels.
        chosen: whether steps and ratio are the request's; otherwise a policy's, later.

    Raises:
        MegError: what cannot be generated, naming the value and what is allowed.
    """
    check(request, pipeline)
    size = picture_size(pipeline, request)
    if chosen:
        _bits(pipeline, size, request.ratio, dtype)
    ids = [
        tokenize(pipeline.tokenizers, [request.prompt]),
        tokenize(pipeline.tokenizers, [request.negative_prompt], "negative_prompt", allow_empty=True),
    ]
    return Task(
        np.concatenate(ids, axis=1),
        size,
        request.seed,
        request.steps if chosen else None,
        request.ratio if chosen else None,
        request.guidance,
        dtype,
    )


def grid_of(pipeline: Pipeline, size: Size) -> Grid:
    """Token rows and columns of a picture's latent."""
    scale = pipeline.vae_decoder.config.downsampling
    return merging.token_grid(size[0] // scale, size[1] // scale)


def largest_ratio(pipeline: Pipeline, size: Size) -> float:
    """The most of a picture's tokens that can be merged."""
    return min(MAX_RATIO["default"], counts.largest_ratio(grid_of(pipeline, size)))


def messages(
    pipeline: Pipeline, tasks: Sequence[Task], batch: int, tome_ratio: float = 0.0
) -> tuple[list[Sent | MegError], Times]:
    """Generate pictures of one size and write their messages.

    Args:
        pipeline: the backbone.
        tasks: at most `batch` of them, all of one size, steps and ratio chosen.
        batch: rows of the compiled programs; what is left is filled with a copy of the first task.
        tome_ratio: of the tokens merged inside the U-Net's self-attention.

    Returns:
        Each task's message, or why it has none; and the time.
    """
    latents_BxHxWxC, times = latents(pipeline, tasks, batch, tome_ratio)
    start = time.perf_counter()
    seed_B = jnp.asarray(_column(tasks, batch, "seed"), jnp.uint32)
    ratio_B = jnp.asarray(_column(tasks, batch, "ratio"), jnp.float32)
    merged = jax.device_get(merge(latents_BxHxWxC, seed_B, ratio_B))
    grid = grid_of(pipeline, tasks[0].size)
    sent = [_write(merged, row, task, pipeline, grid) for row, task in enumerate(tasks)]
    return sent, times._replace(merge_s=time.perf_counter() - start)


def latents(
    pipeline: Pipeline, tasks: Sequence[Task], batch: int, tome_ratio: float = 0.0
) -> tuple[Float[Array, "B H W C"], Times]:
    """Run the text encoders and the U-Net on a batch; see `messages`."""
    start = time.perf_counter()
    size, params = tasks[0].size, pipeline.params
    rows = [*tasks, *[tasks[0]] * (batch - len(tasks))]
    ids_2x2BxL = np.concatenate([row.ids_2x2xL[:, i : i + 1] for i in (0, 1) for row in rows], axis=1)
    both = jax.block_until_ready(condition(pipeline, params, jnp.asarray(ids_2x2BxL), size=size))
    encoded = time.perf_counter()
    z_BxHxWxC = denoise_rows(
        pipeline,
        unet_params(pipeline)[0],
        both,
        jnp.asarray(_column(tasks, batch, "seed"), jnp.uint32),
        jnp.asarray(_column(tasks, batch, "steps"), jnp.int32),
        jnp.asarray(_column(tasks, batch, "guidance"), jnp.float32),
        size=size,
        tome_ratio=tome_ratio,
    )
    z_BxHxWxC.block_until_ready()
    return z_BxHxWxC, Times(encoded - start, time.perf_counter() - encoded)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("size", "tome_ratio"))
def denoise_rows(
    pipeline: Pipeline,
    params: Params,
    both: Conditioning,
    seed_B: UInt32[Array, " B"],
    steps_B: Int[Array, " B"],
    guidance_B: Float[Array, " B"],
    *,
    size: Size,
    tome_ratio: float = 0.0,
) -> Float[Array, "B H W C"]:
    """Denoise rows that differ in seed, steps and guidance, as long as the one of most steps takes.

    Args:
        pipeline: the networks and the schedule.
        params: of the U-Net.
        both: conditioning of the prompts, and after them of the negative prompts.
        seed_B: of each row's noise.
        steps_B: T of each row.
        guidance_B: of each row.
        size: of the pictures.
        tome_ratio: see `messages`.
    """
    config, sampler = pipeline.vae_decoder.config, unet_params(pipeline)[1]
    height, width = (side // config.downsampling for side in size)
    shape = (1, height, width, config.latent_channels)
    B = seed_B.shape[0]

    def row(seed: Array, prompt: Conditioning, empty: Conditioning, steps: Array, guidance: Array) -> Array:
        prompt, empty = jax.tree.map(lambda x: x[None], (prompt, empty))
        noise = jax.random.normal(request_keys(seed).noise, shape, jnp.float32)
        start = jnp.zeros(shape, jnp.float32)
        given = (params, noise, prompt, empty, steps, guidance, start, 1.0)
        return denoise(pipeline, *given, sampler=sampler, tome_ratio=tome_ratio)[0]

    prompt, empty = jax.tree.map(lambda x: x[:B], both), jax.tree.map(lambda x: x[B:], both)
    return jax.vmap(row)(seed_B, prompt, empty, steps_B, guidance_B)


class Merged(NamedTuple):
    """What each row's message holds, in shapes that depend on the grid alone."""

    features_BxNxD: Float[Array, "B N D"]
    plan: merging.Plan
    key_Bx2: UInt32[Array, "B 2"]


@jax.jit
def merge(
    z_BxHxWxC: Float[Array, "B H W C"], seed_B: UInt32[Array, " B"], ratio_B: Float[Array, " B"]
) -> Merged:
    """Merge rows that differ in seed and ratio, as `megjax.pipeline.split.send` does.

    Args:
        z_BxHxWxC: latents.
        seed_B: of each row's partition.
        ratio_B: r of each row.
    """
    grid = merging.token_grid(*z_BxHxWxC.shape[1:3])

    def row(z_HxWxC: Array, seed: Array, ratio: Array) -> Merged:
        key = request_keys(seed).partition
        tokens = merging.to_tokens(z_HxWxC[None], "patch")[0]
        plan, key = merging.match_best(tokens, key, ratio, grid)
        return Merged(merging.merge(tokens, plan), plan, jax.random.key_data(key))

    return jax.vmap(row)(z_BxHxWxC, seed_B, ratio_B)


def _column(tasks: Sequence[Task], batch: int, name: str) -> np.ndarray:
    """One number of every row; filling rows repeat the first, but take the fewest steps of all."""
    values = [getattr(task, name) for task in tasks]
    filling = min(values) if name == "steps" else values[0]
    return np.asarray(values + [filling] * (batch - len(values)))


def _write(merged: Merged, row: int, task: Task, pipeline: Pipeline, grid: Grid) -> Sent | MegError:
    features_NxD, plan, key_data = jax.tree.map(lambda x: x[row], merged)
    ratio = task.ratio
    assert ratio is not None
    try:
        key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        message = merging.pack(features_NxD, plan, key, ratio, grid, dtype=task.dtype)
        return Sent(message, int(plan.count), _bits(pipeline, task.size, ratio, task.dtype))
    except MegError as error:
        return error


def _bits(pipeline: Pipeline, size: Size, ratio: float, dtype: wire.WireDtype) -> int:
    grid, values = grid_of(pipeline, size), 4 * pipeline.vae_decoder.config.latent_channels
    bits = 8 if dtype == "int8" else 16
    return int(payload_bits(ratio, grid[0] * grid[1], values, bits, grid=grid))


def blank(pipeline: Pipeline, request: Request) -> Task:
    """A task of no words, to compile and time programs with."""
    ids = tokenize(pipeline.tokenizers, ["", ""], allow_empty=True)
    size = picture_size(pipeline, request)
    return Task(ids, size, request.seed, request.steps, request.ratio, request.guidance, "float16")
