"""Match every source to its most similar destination and choose the R best pairs, Eqs. (15)-(16)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, ScalarLike

from megjax.errors import MegError
from megjax.link.counts import Count, Grid, Rounds, is_static, merged_counts
from megjax.merging.operator import merge, unmerge
from megjax.merging.partition import Partition, fixed_partition, partition
from megjax.merging.plan import Matches, Plan, build_plan
from megjax.merging.selection import highest
from megjax.merging.similarity import Similarity, cosine, euclidean

PARTITIONS = 16
"""So many random partitions a sender tries (docs/merging-study.md)."""


def match(
    tokens_NxD: Float[Array, "*b N D"],
    key: PRNGKeyArray | None,
    ratio: ScalarLike,
    grid: Grid,
    *,
    rounds: Rounds = 2,
    similarity: Similarity = cosine,
    weighted: bool = True,
) -> Plan:
    """Plan a merge, Eqs. (15)-(16): each source's best destination, and the R pairs most alike.

    Args:
        tokens_NxD: tokens, row-major on their grid; leading axes are a batch, which shares the partition.
        key: partition key; None puts each destination at its cell's top left.
        ratio: merging ratio in [0, 1]. A plain number is static and makes truly shorter arrays; an array is
            traced, keeps N rows and is clipped to what the rounds can merge. Both give the same tokens.
        grid: token rows and columns.
        rounds: 2 merges up to 15/16 of the tokens, 1 up to 3/4 (the paper's).
        similarity: `cosine` or `euclidean`.
        weighted: whether round 2 weights a destination by the tokens already merged into it.

    Raises:
        MegError: tokens that do not fill the grid, or a static ratio that cannot be honoured.
    """
    partitions = fixed_partition(grid, rounds) if key is None else partition(key, grid, rounds)
    return match_partition(tokens_NxD, partitions, ratio, grid, similarity=similarity, weighted=weighted)


def match_partition(
    tokens_NxD: Float[Array, "*b N D"],
    partitions: tuple[Partition, ...],
    ratio: ScalarLike,
    grid: Grid,
    *,
    similarity: Similarity = cosine,
    weighted: bool = True,
) -> Plan:
    """Plan a merge as `match` does, on partitions already drawn, one a round, for as many calls as wanted."""
    if tokens_NxD.shape[-2] != grid[0] * grid[1]:
        raise MegError(
            f"{tokens_NxD.shape[-2]} tokens on a {grid[0]} x {grid[1]} grid: need {grid[0] * grid[1]}"
        )
    counts = merged_counts(ratio, grid, 2 if len(partitions) > 1 else 1)
    rows = tokens_NxD.shape[-2]
    if is_static(ratio):
        rows -= int(sum(counts))
        # A static round that merges nothing leaves no trace.
        used = max(1, sum(count > 0 for count in counts))
        partitions, counts = partitions[:used], counts[:used]

    def plan_one(x_NxD: Array) -> Plan:
        rounds = _match_rounds(x_NxD, partitions, counts, similarity)
        return build_plan(partitions, rounds, counts, rows, weighted)

    for _ in range(tokens_NxD.ndim - 2):
        plan_one = jax.vmap(plan_one)
    return plan_one(jax.lax.stop_gradient(tokens_NxD))


def match_best(
    tokens_NxD: Float[Array, "*b N D"], key: PRNGKeyArray, ratio: ScalarLike, grid: Grid
) -> tuple[Plan, Key[Array, "*b"]]:
    """Plan as `match` does by Euclidean distance, on the best of 16 random partitions for each picture.

    The receiver needs no more than the chosen key, which a message carries anyhow.

    Args:
        tokens_NxD: see `match`.
        key: the i-th partition's key is `fold_in(key, i)`.
        ratio: see `match`.
        grid: token rows and columns.

    Returns:
        Each picture's plan and its partition's key.

    Raises:
        MegError: see `match`.
    """
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(PARTITIONS))
    return least_change(
        tokens_NxD, keys, lambda key: match(tokens_NxD, key, ratio, grid, similarity=euclidean)
    )


def least_change(
    tokens_NxD: Float[Array, "*b N D"], keys_K: Key[Array, " K"], planner: Callable[[PRNGKeyArray], Plan]
) -> tuple[Plan, Key[Array, "*b"]]:
    """Plan with each key in turn; return the plan that changes a picture's tokens least, and its key.

    Args:
        tokens_NxD: what is merged; leading axes are a batch, of which each picture has its own choice.
        keys_K: to try.
        planner: plans these tokens' merge on a key's partition.
    """

    def attempt(key: PRNGKeyArray) -> tuple[Array, Plan]:
        plan = planner(key)
        change_NxD = unmerge(merge(tokens_NxD, plan), plan).astype(jnp.float32) - tokens_NxD
        return jnp.sum(jnp.square(change_NxD), axis=(-2, -1)), plan

    # One after the other, so that the matching's memory does not grow.
    change_Kxb, plan_Kxb = jax.lax.map(attempt, keys_K)
    best_b = jnp.argmin(change_Kxb, axis=0)

    def chosen(leaf_Kxb: Array) -> Array:
        index = best_b.reshape(1, *best_b.shape, *(1,) * (leaf_Kxb.ndim - 1 - best_b.ndim))
        return jnp.take_along_axis(leaf_Kxb, index, axis=0)[0]

    return jax.tree.map(chosen, plan_Kxb), keys_K[best_b]


def _match_rounds(
    x_NxD: Array, partitions: tuple[Partition, ...], counts: tuple[Count, ...], similarity: Similarity
) -> tuple[Matches, ...]:
    first = _match_round(x_NxD, partitions[0], counts[0], similarity)
    if len(partitions) == 1:
        return (first,)

    def second_round() -> Matches:
        # It starts once every source is merged: its tokens are the averages of round 1.
        everyone = Matches(jnp.ones_like(first.merged_A), first.best_A)
        sources, destinations = partitions[0].source_A.size, partitions[0].destination_B.size
        averages = merge(x_NxD, build_plan(partitions[:1], (everyone,), (sources,), destinations))
        return _match_round(averages, partitions[1], counts[1], similarity)

    def no_round() -> Matches:
        shape = partitions[1].source_A.shape
        return Matches(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))

    if isinstance(counts[1], int):
        return (first, second_round())
    return (first, jax.lax.cond(counts[1] > 0, second_round, no_round))


def _match_round(x_NxD: Array, partition: Partition, count: Count, similarity: Similarity) -> Matches:
    """Match one round's tokens; with no destination nothing merges."""
    if partition.destination_B.size == 0:
        return Matches(
            jnp.zeros(partition.source_A.shape, bool), jnp.zeros(partition.source_A.shape, jnp.int32)
        )
    # A CPU wants blocks that stay in its cache, a GPU or TPU few large steps within its memory.
    widest = max(64, 2**24 // partition.destination_B.size)
    score_A, best_A = jax.lax.platform_dependent(
        x_NxD,
        partition,
        cpu=partial(best_destination, similarity=similarity, width=64),
        default=partial(best_destination, similarity=similarity, width=widest),
    )
    return Matches(highest(score_A, count), best_A)


def best_destination(
    x_NxD: Float[Array, "N D"], partition: Partition, similarity: Similarity, width: int
) -> tuple[Float[Array, " A"], Int[Array, " A"]]:
    """Return each source's highest similarity, Eq. (15), and its destination, the first of equal ones.

    Args:
        x_NxD: tokens.
        partition: their sources and destinations.
        similarity: see `match`.
        width: sources to hold the similarities of at once.
    """
    # 16-bit tokens multiply exactly in fewer passes, as long as they stay what they are: their gain comes
    # after the product. By default a TPU rounds to bfloat16, in "high" it errs by 2^-16 of a float16; a GPU
    # rounds to TF32, which holds both.
    exact = x_NxD.dtype.itemsize < 4
    precision = "highest" if not exact else "default" if x_NxD.dtype == jnp.bfloat16 else "high"
    b_BxD = x_NxD[partition.destination_B].astype(jnp.float32)
    to = similarity(b_BxD)
    if to.gain_N is not None and not exact:
        b_BxD = b_BxD * to.gain_N[:, None]
    sources, destinations = partition.source_A.size, b_BxD.shape[0]
    index_Bx1 = jnp.arange(destinations, dtype=jnp.int32)[:, None]

    def best_of_block(source_K: Array) -> tuple[Array, Array]:
        a_KxD = x_NxD[source_K].astype(jnp.float32)
        of = similarity(a_KxD)
        s_BxK = jnp.matmul(b_BxD, a_KxD.T, precision=precision)
        if to.gain_N is not None and exact:
            s_BxK = s_BxK * to.gain_N[:, None]
        if to.bias_N is not None:
            s_BxK = s_BxK + to.bias_N[:, None]
        score_K = jnp.max(s_BxK, axis=0)
        # Two reductions over the slow axis run as vector code where an argmax does not.
        best_K = jnp.min(jnp.where(s_BxK == score_K[None, :], index_Bx1, destinations - 1), axis=0)
        if of.scale_N is not None:
            score_K = score_K * of.scale_N
        return score_K if of.offset_N is None else score_K + of.offset_N, best_K

    blocks = -(-sources // width)
    if blocks == 1:
        return best_of_block(partition.source_A)
    width = -(-sources // blocks)
    source_nxK = jnp.pad(partition.source_A, (0, blocks * width - sources)).reshape(blocks, width)
    score_nxK, best_nxK = jax.lax.map(best_of_block, source_nxK)
    return score_nxK.reshape(-1)[:sources], best_nxK.reshape(-1)[:sources]
