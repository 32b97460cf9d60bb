"""The plan of a merge: which row each token goes to, and how it was found."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from megjax.link.counts import Count
from megjax.merging.partition import Partition


class Matches(NamedTuple):
    """One round's outcome: who merges, and the destination (an index into B) that each source likes best."""

    merged_A: Bool[Array, "*b A"]
    best_A: Int[Array, "*b A"]


class Plan(NamedTuple):
    """Who merges where, for N tokens and M output rows: M = N - R for a static ratio, N for a traced one.

    Rows 0 .. count - 1 are, in this order, the unmerged sources and the destinations; rows after them are
    padding. Where a second round merges, the destinations are its unmerged sources and its destinations.
    """

    row_N: Int[Array, "*b N"]
    """The row that each token is merged into, or stands on."""
    weight_N: Float[Array, "*b N"] | None
    """Each token's weight in its row; None is one each."""
    total_M: Float[Array, "*b M"]
    """The weights' sum in each row, 0 for padding."""
    count: Int[Array, "*b"]
    """Valid rows, N - R."""
    rounds: tuple[Matches, ...]
    """What each round found, for the wire."""


def build_plan(
    partitions: tuple[Partition, ...],
    rounds: tuple[Matches, ...],
    counts: tuple[Count, ...],
    rows: int,
    weighted: bool = True,
) -> Plan:
    """Turn the rounds' matches into a plan with `rows` output rows; sender and receiver both do it.

    Args:
        partitions: each round's partition.
        rounds: each round's matches, without a batch.
        counts: merged tokens of each round.
        rows: M.
        weighted: see `match`.
    """
    first, first_round = partitions[0], rounds[0]
    a, b = first.source_A.size, first.destination_B.size
    row_B = jnp.arange(b, dtype=jnp.int32)
    if len(rounds) > 1:
        second = _rows(partitions[1], rounds[1], counts[1], jnp.arange(partitions[1].destination_B.size))
        row_B = jnp.where(jnp.asarray(counts[1]) > 0, second, row_B)
    row_N = _rows(first, first_round, counts[0], row_B)
    weight_N = None
    if not weighted and len(rounds) > 1 and b:
        size_B = jnp.ones((b,)).at[first_round.best_A].add(first_round.merged_A.astype(jnp.float32))
        weight_A = jnp.where(first_round.merged_A, 1 / size_B[first_round.best_A], 1.0)
        weight_N = jnp.concatenate([weight_A, 1 / size_B])[first.slot_N]
    total_M = jax.ops.segment_sum(jnp.ones((a + b,)) if weight_N is None else weight_N, row_N, rows)
    count = jnp.asarray(a + b - sum(counts), jnp.int32)
    return Plan(row_N, weight_N, total_M, count, rounds)


def _rows(partition: Partition, matches: Matches, count: Count, row_B: Array) -> Array:
    """Return each token's row: unmerged sources first, in order, then `row_B` counted from there on."""
    first_destination = partition.source_A.size - count
    row_B = row_B + first_destination
    unmerged = jnp.cumsum(~matches.merged_A, dtype=jnp.int32) - 1
    # A grid without a whole cell has no destination to look up, and merges nothing.
    row_A = jnp.where(matches.merged_A, row_B[matches.best_A], unmerged) if row_B.size else unmerged
    return jnp.concatenate([row_A, row_B])[partition.slot_N].astype(jnp.int32)
