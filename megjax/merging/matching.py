"""Match every source to its most similar destination and choose the R best pairs, Eqs. (15)-(16)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from megjax.errors import MegError
from megjax.link.counts import Count, Grid, Rounds, is_static, merged_counts
from megjax.merging.operator import merge
from megjax.merging.partition import Partition, fixed_partition, partition
from megjax.merging.plan import Matches, Plan, build_plan
from megjax.merging.similarity import Similarity, cosine


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
        ratio: merging ratio in [0, 1]. A plain number is static and makes truly shorter arrays; an array is traced,
            keeps N rows and is clipped to what the rounds can merge. Both give the same tokens.
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
    """Plan a merge as `match` does, on partitions already drawn: one a round, shared by as many calls as wanted."""
    if tokens_NxD.shape[-2] != grid[0] * grid[1]:
        raise MegError(
            f"{tokens_NxD.shape[-2]} tokens on a {grid[0]} x {grid[1]} grid: need {grid[0] * grid[1]}"
        )
    counts = merged_counts(ratio, grid, 2 if len(partitions) > 1 else 1)[: len(partitions)]
    static = is_static(ratio)
    if static:
        # A round that merges nothing leaves no trace in a static plan's work.
        used = max(1, sum(count > 0 for count in counts))
        partitions, counts = partitions[:used], counts[:used]
    rows = tokens_NxD.shape[-2] - sum(counts) if static else tokens_NxD.shape[-2]

    def plan_one(x_NxD: Array) -> Plan:
        rounds = _match_rounds(x_NxD, partitions, counts, similarity, weighted)
        return build_plan(partitions, rounds, counts, rows, weighted)

    for _ in range(tokens_NxD.ndim - 2):
        plan_one = jax.vmap(plan_one)
    return plan_one(jax.lax.stop_gradient(tokens_NxD))


def _match_rounds(
    x_NxD: Array,
    partitions: tuple[Partition, ...],
    counts: tuple[Count, ...],
    similarity: Similarity,
    weighted: bool,
) -> tuple[Matches, ...]:
    rounds: list[Matches] = []
    for i, (part, count) in enumerate(zip(partitions, counts, strict=True)):
        if i:
            # Round 2 starts once every source is merged: the destinations' averages are its tokens.
            done = jax.tree.map(jnp.ones_like, rounds[0].merged_A)
            plan = build_plan(
                partitions[:1],
                (Matches(done, rounds[0].best_A),),
                (done.shape[0],),
                partitions[0].destination_B.shape[0],
            )
            x_NxD = merge(x_NxD, plan)
        score_A, best_A = _best(x_NxD[part.source_A], x_NxD[part.destination_B], similarity)
        rounds.append(Matches(_highest(score_A, count), best_A))
    return tuple(rounds)


def _best(a_AxD: Array, b_BxD: Array, similarity: Similarity) -> tuple[Array, Array]:
    """Return each source's highest similarity and the destination that has it."""
    if b_BxD.shape[0] == 0:
        return jnp.full(a_AxD.shape[:1], -jnp.inf), jnp.zeros(a_AxD.shape[:1], jnp.int32)
    a_AxD, b_BxD = a_AxD.astype(jnp.float32), b_BxD.astype(jnp.float32)
    s = similarity(a_AxD, b_BxD)
    scores_AxB = jnp.matmul(a_AxD, s.b_BxD.T, precision="highest")
    if s.bias_B is not None:
        scores_AxB = scores_AxB + s.bias_B[None, :]
    score_A = jnp.max(scores_AxB, axis=-1) * s.scale_A
    if s.offset_A is not None:
        score_A = score_A + s.offset_A
    return score_A, jnp.argmax(scores_AxB, axis=-1).astype(jnp.int32)


def _highest(score_A: Array, count: Count) -> Array:
    """Mark the `count` highest scores; of equal ones the first."""
    rank_A = jnp.argsort(jnp.argsort(score_A, descending=True, stable=True))
    return rank_A < count
