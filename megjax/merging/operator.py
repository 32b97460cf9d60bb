"""Merge tokens by a plan and spread them again, Eqs. (17), (18) and (20)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megjax.errors import MegError
from megjax.merging.plan import Plan


def merge(tokens_NxD: Float[Array, "*b N D"], plan: Plan) -> Float[Array, "*b M D"]:
    """Average the tokens of each row, Eq. (17), into Z' = [unmerged sources, destinations], Eq. (18).

    A plan without a batch serves every picture of one. Sums are taken in float32. Rows from `plan.count` on
    (traced ratios) are zeros.

    Raises:
        MegError: tokens that are not the plan's.
    """
    _check(tokens_NxD, plan.row_N.shape[-1], plan, "tokens")
    return _each(_merge, tokens_NxD, plan)


def unmerge(merged_MxD: Float[Array, "*b M D"], plan: Plan) -> Float[Array, "*b N D"]:
    """Copy each row back to all of its tokens, Eq. (20).

    Raises:
        MegError: rows that are not the plan's.
    """
    _check(merged_MxD, plan.total_M.shape[-1], plan, "rows")
    return _each(_unmerge, merged_MxD, plan)


def _each(function: Callable[[Array, Plan], Array], x: Array, plan: Plan) -> Array:
    if x.ndim == 2:
        return function(x, plan)
    axis = 0 if plan.row_N.ndim > 1 else None
    return jax.vmap(partial(_each, function), in_axes=(0, axis))(x, plan)


def _merge(tokens_NxD: Array, plan: Plan) -> Array:
    x = tokens_NxD.astype(jnp.float32)
    if plan.weight_N is not None:
        x = x * plan.weight_N[:, None]
    sums = jax.ops.segment_sum(x, plan.row_N, plan.total_M.shape[0])
    # Padding holds no token: its sum is zero whatever divides it.
    return (sums / jnp.where(plan.total_M > 0, plan.total_M, 1.0)[:, None]).astype(tokens_NxD.dtype)


def _unmerge(merged_MxD: Array, plan: Plan) -> Array:
    return merged_MxD.at[plan.row_N].get(mode="promise_in_bounds")


def _check(x: Array, expected: int, plan: Plan, what: str) -> None:
    if x.shape[-2] != expected:
        raise MegError(
            f"{x.shape[-2]} {what} for a plan of {expected}: pass the plan that `match` made for them"
        )
    batch = plan.row_N.shape[:-1]
    if batch and batch != x.shape[:-2]:
        raise MegError(f"batch {x.shape[:-2]} of {what} for plans of batch {batch}: they must be equal")
