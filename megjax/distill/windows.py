"""Both ends of every window of the teacher's trajectories, solved once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megjax.diffusion import Conditioning, guided
from megjax.distill.cache import Block, Cache, cached
from megjax.distill.encoding import on_each_device, over_devices, stored, whole_batch
from megjax.distill.perflow import SolverOrder, noisy_start, solve_window, trajectory_windows
from megjax.errors import MegError
from megjax.models import time_ids
from megjax.pipeline.load import Pipeline


def check_draws(windows: int, draws: tuple[int, ...], chained: bool) -> None:
    """Refuse draws that no trajectories can be solved for.

    Raises:
        MegError: see `trajectory_windows`; chained, and a window has more draws than the one before.
    """
    trajectory_windows(windows, draws)
    if chained and list(draws) != sorted(draws, reverse=True):
        raise MegError(f"chained, with window_draws {draws}: no window can have more than the one before")


def solved_windows(
    pipeline: Pipeline,
    rows: Cache,
    empty: tuple[Float[Array, "1 L E"], Float[Array, "1 P"]],
    folder: Path,
    key: Mapping[str, Any],
    batch: int,
    *,
    guidance: float,
    windows: int,
    draws: tuple[int, ...],
    chained: bool,
    pure_noise: bool,
    solver_steps: int,
    solver_order: SolverOrder,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Cache:
    """Rows of `z_s` and `z_e` (J, H, W, C), the noisiest window first, beside those of `encoded_pictures`.

    Args:
        pipeline: whose U-Net is the teacher.
        rows: latents and text embeddings.
        empty: text and pooled embedding of the empty prompt.
        folder: of all caches.
        key: all that the rows and the teacher depend on.
        batch: examples at a time.
        guidance: of the teacher's solver.
        windows: K.
        draws: trajectories through each window, see `trajectory_windows`.
        chained: the d-th trajectory through a window starts where the d-th through the one before ended, as
            a sampler's does, and only the noisiest starts by Eq. (10).
        pure_noise: see `noisy_start`.
        solver_steps: S.
        solver_order: see `solve_window`.
        seed: of the noise; each trajectory has its own.
        progress: told the examples done.

    Raises:
        MegError: see `check_draws`; the teacher's ends are not finite numbers of float16.
    """
    sched, side = pipeline.schedule, pipeline.image_size
    S = len(sched.abar)
    check_draws(windows, draws, chained)
    chosen = trajectory_windows(windows, draws)
    window_J = jnp.array(chosen)
    draw_J = jnp.array([j - chosen.index(k) for j, k in enumerate(chosen)])

    @jax.jit
    def solve(params: Any, numbers: Array, z0: Array, text: Array, pooled: Array) -> tuple[Array, Array]:
        B = len(z0)
        sizes = time_ids(side, side, B)
        no_text, no_pooled = (jnp.broadcast_to(x, (B, *x.shape[1:])) for x in empty)
        prompt, no_prompt = Conditioning(text, pooled, sizes), Conditioning(no_text, no_pooled, sizes)
        teacher = guided(pipeline.unet, params, prompt, no_prompt, guidance)
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers)

        def trajectory(ends: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
            start, end = (jnp.full(B, (windows - window_J[j] - i) * S // windows) for i in (0, 1))
            one_key = jax.vmap(lambda key: jax.random.fold_in(key, j))(keys)
            noise = jax.vmap(lambda key: jax.random.normal(key, z0.shape[1:], z0.dtype))(one_key)
            z_s = noisy_start(noise, z0, sched, start, pure_noise=pure_noise)
            if chained:
                z_s = jnp.where(window_J[j] > 0, ends[draw_J[j]], z_s)
            z_e = solve_window(teacher, z_s, start, end, sched, solver_steps, solver_order)
            return ends.at[draw_J[j]].set(z_e), (z_s, z_e)

        ends = jnp.zeros((max(draws, default=1), *z0.shape), z0.dtype)
        _, (z_s, z_e) = jax.lax.scan(trajectory, ends, jnp.arange(len(window_J)))
        return z_s.swapaxes(0, 1), z_e.swapaxes(0, 1)

    unet, batch = on_each_device(pipeline.params["unet"]), whole_batch(batch)

    def compute(start: int, stop: int) -> Block:
        blocks = []
        for at in range(start, stop, batch):
            numbers = np.arange(at, min(at + batch, stop))
            # Always the same shape, so that one executable serves all.
            padded = np.concatenate([numbers, np.repeat(numbers[-1:], batch - len(numbers))])
            some = [rows[int(n)] for n in padded]
            stacked = {name: np.stack([row[name] for row in some]) for name in some[0]}
            given = (over_devices(stacked[name].astype(np.float32)) for name in ("z0", "text", "pooled"))
            z_s, z_e = solve(unet, over_devices(padded), *given)
            ends = {name: stored(name, np.asarray(z)) for name, z in (("z_s", z_s), ("z_e", z_e))}
            blocks.append({name: x[: len(numbers)] for name, x in (stacked | ends).items()})
        return Block({name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]})

    own = {
        "kind": "windows",
        "guidance": guidance,
        "windows": windows,
        "draws": draws,
        "chained": chained,
        "pure_noise": pure_noise,
        "solver_steps": solver_steps,
        "solver_order": solver_order,
        "seed": seed,
    }
    return cached(folder, {**key, **own}, len(rows), compute, progress=progress, shard=256)
