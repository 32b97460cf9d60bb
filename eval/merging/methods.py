"""Ways to send a latent in fewer bits: what each charges, and the latent that the receiver gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from megjax import merging
from megjax.link.counts import Count, Grid, Rounds, merged_counts
from megjax.link.features import transmit
from megjax.link.payload import side_information_bytes
from megjax.merging.matching import best_destination
from megjax.merging.partition import Partition
from megjax.merging.plan import Matches, Plan, build_plan
from megjax.merging.selection import highest

Shape: TypeAlias = tuple[int, int, int]
"""Height, width and channels of a latent."""
Compress: TypeAlias = Callable[[PRNGKeyArray, Array, Array, Array], Array]
"""(key, latent, level, psnr_db) to the latent that the receiver gets; the level is traced."""
Bits: TypeAlias = Callable[[Shape, float], int]
"""What one message costs at a level, side information included."""
Planner: TypeAlias = Callable[[PRNGKeyArray, Array, Array, Grid], Plan]
"""(key, tokens, traced ratio, grid) to who merges where."""


class Method(NamedTuple):
    """A way to send a latent, over its levels from the most bits to the fewest."""

    levels: tuple[float, ...]
    bits: Bits
    compress: Compress


RATIOS = (0.0, 1 / 32, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 13 / 16, 7 / 8, 15 / 16)


# Merging: the level is the ratio.


def plain(
    key: PRNGKeyArray,
    x_NxD: Array,
    ratio: Array,
    grid: Grid,
    *,
    rounds: Rounds = 2,
    similarity: merging.Similarity = merging.euclidean,
    weighted: bool = True,
) -> Plan:
    """Plan as `merging.match` does."""
    return merging.match(x_NxD, key, ratio, grid, rounds=rounds, similarity=similarity, weighted=weighted)


def lloyd(
    key: PRNGKeyArray,
    x_NxD: Array,
    ratio: Array,
    grid: Grid,
    *,
    iterations: int = 3,
    rounds: Rounds = 2,
) -> Plan:
    """Plan by Euclidean matching, then refine it by Lloyd's iterations on the same partition.

    A source is compared with the average that it would become, not with the destination alone. Given the
    averages, the nearest one of each source and the R nearest sources are optimal; given these, the average
    is: no iteration raises the squared error. The message is of the same form and length.
    """
    partitions = merging.partition(key, grid, rounds)
    counts = merged_counts(ratio, grid, rounds)
    plan = merging.match_partition(x_NxD, partitions, ratio, grid, similarity=merging.euclidean)
    source_A, destination_B, slot_N = partitions[0]
    a, b = source_A.size, destination_B.size
    averaged = Partition(jnp.arange(a), jnp.arange(a, a + b), slot_N)

    def refine(_: Array, plan: Plan) -> Plan:
        average_B = merging.unmerge(merging.merge(x_NxD, plan), plan)[destination_B]
        candidates = jnp.concatenate([x_NxD[source_A], average_B])
        score_A, best_A = best_destination(candidates, averaged, merging.euclidean, width=64)
        first = Matches(highest(score_A, counts[0]), best_A)
        return build_plan(partitions, (first, *plan.rounds[1:]), counts, grid[0] * grid[1])

    return jax.lax.fori_loop(0, iterations, refine, plan)


def best_of(planner: Planner, draws: int, key: PRNGKeyArray, x_NxD: Array, ratio: Array, grid: Grid) -> Plan:
    """Try several partitions and keep the one that changes the tokens least; its number must be sent."""
    keys = jax.random.split(key, draws)
    return merging.least_change(x_NxD, keys, lambda key: planner(key, x_NxD, ratio, grid))[0]


def merged(
    planner: Planner,
    *,
    layout: merging.Layout = "patch",
    rounds: Rounds = 2,
    bits_per_scalar: int = 16,
    extra_bits: int = 0,
) -> Method:
    """Merge tokens, Eqs. (15)-(20).

    Args:
        planner: who merges where.
        layout: of the tokens.
        rounds: of the planner.
        bits_per_scalar: fewer than 16 are quantised as `precision` does.
        extra_bits: what else the planner must tell the receiver.
    """

    def bits(shape: Shape, ratio: float) -> int:
        h, w, c = shape
        grid = merging.token_grid(h, w)
        counts = merged_counts(ratio, grid, rounds)
        rows = grid[0] * grid[1] - sum(int(count) for count in counts)
        return rows * 4 * c * bits_per_scalar + 8 * int(side_information_bytes(counts, grid)) + extra_bits

    def compress(key: PRNGKeyArray, z_HxWxC: Array, ratio: Array, psnr_db: Array) -> Array:
        key_plan, key_noise = jax.random.split(key)
        tokens_NxD, grid = merging.to_tokens(z_HxWxC, layout), merging.token_grid(*z_HxWxC.shape[:2])
        plan = planner(key_plan, tokens_NxD, ratio, grid)
        rows_NxD = merging.merge(tokens_NxD, plan)
        if bits_per_scalar < 16:
            rows_NxD = round_to(rows_NxD, jnp.asarray(bits_per_scalar, jnp.float32))
        received = transmit(key_noise, rows_NxD, psnr_db, plan.count)
        return merging.from_tokens(merging.unmerge(received, plan), grid, layout)

    most = 1 - 0.25**rounds
    return Method(tuple(ratio for ratio in RATIOS if ratio <= most), bits, compress)


# The rivals: the level is the share that is left out, or the bits a scalar.


def pruned() -> Method:
    """Leave out the scalars of least magnitude; the receiver puts zeros, the mean of normalised latents."""

    def bits(shape: Shape, dropped: float) -> int:
        scalars = shape[0] * shape[1] * shape[2]
        kept = int(kept_of(scalars, dropped))
        # Who is kept: one bit a scalar, or a list where that is shorter.
        index = 0 if kept == scalars else min(scalars, kept * (scalars - 1).bit_length())
        return 16 * kept + index

    def compress(key: PRNGKeyArray, z_HxWxC: Array, dropped: Array, psnr_db: Array) -> Array:
        kept = kept_of(z_HxWxC.size, dropped)
        sent = highest(jnp.abs(z_HxWxC).reshape(-1), kept).reshape(z_HxWxC.shape)
        return send(key, z_HxWxC, sent, psnr_db)

    # At 1/32 the map costs more than what is left out.
    return Method((0.0, *RATIOS[2:], 31 / 32, 63 / 64), bits, compress)


def dropped_at_random() -> Method:
    """Leave out 2 x 2 patches drawn from the shared key, free of side information; zeros in their place."""

    def bits(shape: Shape, dropped: float) -> int:
        h, w = merging.token_grid(*shape[:2])
        return 16 * 4 * shape[2] * int(kept_of(h * w, dropped))

    def compress(key: PRNGKeyArray, z_HxWxC: Array, dropped: Array, psnr_db: Array) -> Array:
        key_cells, key_noise = jax.random.split(key)
        h, w = merging.token_grid(*z_HxWxC.shape[:2])
        kept_N = highest(jax.random.uniform(key_cells, (h * w,)), kept_of(h * w, dropped))
        sent_NxD = jnp.broadcast_to(kept_N[:, None], (h * w, 4 * z_HxWxC.shape[2]))
        return send(key_noise, z_HxWxC, merging.from_tokens(sent_NxD, (h, w)), psnr_db)

    return Method((*RATIOS, 31 / 32), bits, compress)


def pooled(*, chosen: bool = False) -> Method:
    """Average 2 x 2 cells of the latent, the level being the share of cells; the others are sent whole.

    Args:
        chosen: cells of least variance first, at one bit a cell; otherwise drawn from the shared key, free.
    """

    def bits(shape: Shape, share: float) -> int:
        h, w = merging.token_grid(*shape[:2])
        whole = int(kept_of(h * w, share))
        side = h * w if chosen and 0 < whole < h * w else 0
        return 16 * shape[2] * (4 * whole + (h * w - whole)) + side

    def compress(key: PRNGKeyArray, z_HxWxC: Array, share: Array, psnr_db: Array) -> Array:
        key_cells, key_noise = jax.random.split(key)
        h, w = merging.token_grid(*z_HxWxC.shape[:2])
        c = z_HxWxC.shape[2]
        cells_Nx4xC = merging.to_tokens(z_HxWxC).reshape(h * w, 4, c)
        mean_NxC = jnp.mean(cells_Nx4xC, axis=1)
        error_N = jnp.sum((cells_Nx4xC - mean_NxC[:, None, :]) ** 2, axis=(1, 2))
        order_N = error_N if chosen else jax.random.uniform(key_cells, (h * w,))
        whole_N = highest(order_N, kept_of(h * w, share))
        # A pooled cell sends its mean in the place of its first pixel.
        values = jnp.where(whole_N[:, None, None], cells_Nx4xC, mean_NxC[:, None, :])
        sent = jnp.broadcast_to(whole_N[:, None, None] | (jnp.arange(4) == 0)[None, :, None], values.shape)
        received = send(key_noise, values, sent, psnr_db)
        received = jnp.where(whole_N[:, None, None], received, received[:, :1])
        return merging.from_tokens(received.reshape(h * w, 4 * c), (h, w))

    return Method((*RATIOS, 1.0), bits, compress)


def precision() -> Method:
    """Round every scalar to fewer bits; the level is bits a scalar, 16 being float16."""

    def bits(shape: Shape, bits_per_scalar: float) -> int:
        return shape[0] * shape[1] * shape[2] * int(bits_per_scalar)

    def compress(key: PRNGKeyArray, z_HxWxC: Array, bits_per_scalar: Array, psnr_db: Array) -> Array:
        z = jnp.where(bits_per_scalar < 16, round_to(z_HxWxC, bits_per_scalar), z_HxWxC)
        return transmit(key, z.reshape(-1, 1), psnr_db).reshape(z.shape)

    return Method((16.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0), bits, compress)


def round_to(x: Float[Array, "*s"], bits_per_scalar: ScalarLike) -> Float[Array, "*s"]:
    """Round to 2^b evenly spaced values around zero; the range that errs least of 16 goes with the header."""
    half = 2.0 ** (jnp.asarray(bits_per_scalar, jnp.float32) - 1)

    def rounded(share: Array) -> Array:
        step = jnp.maximum(share * jnp.max(jnp.abs(x)), jnp.finfo(jnp.float32).tiny) / half
        return (jnp.clip(jnp.floor(x / step), -half, half - 1) + 0.5) * step

    candidates = jax.vmap(rounded)(jnp.linspace(1 / 16, 1.0, 16))
    error = jnp.sum((candidates - x[None]) ** 2, axis=tuple(range(1, candidates.ndim)))
    return candidates[jnp.argmin(error)]


def kept_of(tokens: int, left_out: float | Array) -> Count:
    """Return how many of `tokens` are sent: the rule of Eq. (16) without its limit, static or traced."""
    if isinstance(left_out, jax.Array):
        return tokens - jnp.floor(left_out * tokens + 1e-4).astype(jnp.int32)
    return tokens - int(left_out * tokens + 1e-4)


def send(key: PRNGKeyArray, x: Array, sent: Array, psnr_db: Array) -> Array:
    """Transmit the marked scalars, as 16 bits and with the features' noise; zeros come for the others."""
    order = jnp.argsort(~sent.reshape(-1), stable=True)
    rows = transmit(key, x.reshape(-1)[order][:, None], psnr_db, jnp.sum(sent, dtype=jnp.int32))[:, 0]
    return jnp.zeros_like(rows).at[order].set(rows).reshape(x.shape)


TOMESD = "strip, cosine, 1 round"
"""What tomesd does to the authors' tokens: the baseline. One round weighs all its tokens alike."""
DEFAULT = "patch, Euclidean, 2 rounds"
"""The study's default."""


def methods() -> dict[str, Method]:
    """Return every method by its name; merging is named by layout, similarity and rounds."""
    cosine = functools.partial(plain, similarity=merging.cosine)
    cosine_1 = functools.partial(cosine, rounds=1)
    return {
        TOMESD: merged(cosine_1, layout="strip", rounds=1),
        "strip, Euclidean, 1 round": merged(functools.partial(plain, rounds=1), layout="strip", rounds=1),
        "patch, cosine, 1 round": merged(cosine_1, rounds=1),
        "patch, cosine, 2 rounds": merged(cosine),
        DEFAULT: merged(plain),
        DEFAULT + ", unweighted": merged(functools.partial(plain, weighted=False)),
        DEFAULT + ", Lloyd": merged(lloyd),
        DEFAULT + ", best of 16": merged(functools.partial(best_of, plain, 16), extra_bits=4),
        DEFAULT + ", Lloyd, best of 16": merged(functools.partial(best_of, lloyd, 16), extra_bits=4),
        DEFAULT + ", 8 bits": merged(plain, bits_per_scalar=8),
        DEFAULT + ", 5 bits": merged(plain, bits_per_scalar=5),
        "magnitude pruning": pruned(),
        "random dropping": dropped_at_random(),
        "2 x 2 average pooling": pooled(),
        "2 x 2 average pooling, flattest first": pooled(chosen=True),
        "lower precision": precision(),
    }
