"""The R highest of many scores, exactly, for an R that may be traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from megjax.link.counts import Count


def highest(score_A: Float[Array, " A"], count: Count) -> Bool[Array, " A"]:
    """Mark the `count` highest scores; of equal ones the first."""
    rank_A = _ordered_bits(score_A)
    least = jax.lax.platform_dependent(rank_A, jnp.asarray(count), cpu=kth_by_bisection, default=kth_by_sort)
    above_A, equal_A = rank_A > least, rank_A == least
    room = count - jnp.sum(above_A, dtype=jnp.int32)
    return above_A | (equal_A & (jnp.cumsum(equal_A, dtype=jnp.int32) <= room))


def kth_by_bisection(rank_A: UInt32[Array, " A"], count: Count) -> UInt32[Array, ""]:
    """Return the `count`-th highest rank bit by bit: 32 vector passes, far faster than a sort on a CPU."""

    def next_bit(i: Array | int, least: Array) -> Array:
        higher = least | (jnp.uint32(1) << jnp.asarray(31 - i, jnp.uint32))
        return jnp.where(jnp.sum(rank_A >= higher, dtype=jnp.int32) >= count, higher, least)

    return jax.lax.fori_loop(0, 32, next_bit, jnp.uint32(0))


def kth_by_sort(rank_A: UInt32[Array, " A"], count: Count) -> UInt32[Array, ""]:
    """Return the `count`-th highest rank from one sort, for backends where launches cost more than work."""
    ascending_A = jnp.sort(rank_A)
    return ascending_A[jnp.clip(rank_A.shape[0] - count, 0, rank_A.shape[0] - 1)]


def _ordered_bits(x: Array) -> Array:
    """Map floats to unsigned integers of the same order (-0 below +0)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)
