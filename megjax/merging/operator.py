"""Merge tokens by a plan and spread them again, Eqs. (17), (18) and (20)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megjax.errors import MegError
from megjax.merging.plan import Plan


def merge(tokens_NxD: Float[Array, "*b N D"], plan: Plan) -> Float[Array, "*b M D"]:
    """Average the tokens of each row, Eq. (17), into Z' = [unmerged sources, destinations], Eq. (18).

    Sums are taken in float32. Rows from `plan.count` on (traced ratios) are zeros.

    Raises:
        MegError: tokens that are not the plan's.
    """
    _check(tokens_NxD.shape[-2], plan.row_N.shape[-1], "tokens")
    return _merge(tokens_NxD, plan)


def unmerge(merged_MxD: Float[Array, "*b M D"], plan: Plan) -> Float[Array, "*b N D"]:
    """Copy each row back to all of its tokens, Eq. (20).

    Raises:
        MegError: rows that are not the plan's.
    """
    _check(merged_MxD.shape[-2], plan.total_M.shape[-1], "rows")
    return jnp.take_along_axis(merged_MxD, plan.row_N[..., None], axis=-2, mode="promise_in_bounds")


def _merge(tokens_NxD: Array, plan: Plan) -> Array:
    if tokens_NxD.ndim > 2:
        return jax.vmap(_merge)(tokens_NxD, plan)
    x = tokens_NxD.astype(jnp.float32)
    if plan.weight_N is not None:
        x = x * plan.weight_N[:, None]
    sums = jax.ops.segment_sum(x, plan.row_N, plan.total_M.shape[0])
    return (sums / jnp.maximum(plan.total_M, 1e-30)[:, None]).astype(tokens_NxD.dtype)


def _check(got: int, expected: int, what: str) -> None:
    if got != expected:
        raise MegError(
            f"{got} {what} for a plan of {expected}: pass the plan that `match` made for this grid"
        )
