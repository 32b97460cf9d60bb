"""ToMe for speed: the operator around the U-Net's self-attention (Bolya and Hoffman 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
from jaxtyping import Array, PRNGKeyArray

from megjax.errors import MegError
from megjax.link.counts import Grid
from megjax.merging.matching import match_partition
from megjax.merging.operator import merge, unmerge
from megjax.merging.partition import fixed_partition, partition
from megjax.merging.similarity import Similarity, cosine

Share: TypeAlias = Literal["call", "transformer"]
"""Who shares a random partition: a whole U-Net call, or the blocks of one transformer."""

Merge: TypeAlias = Callable[[Array], tuple[Array, Callable[[Array], Array]]]


def tome(
    ratio: float,
    latent_grid: Grid,
    *,
    key: PRNGKeyArray | None = None,
    max_downsample: int = 4,
    share: Share = "call",
    similarity: Similarity = cosine,
) -> Callable[[Grid, int], Merge | None]:
    """Return a U-Net's `token_merge`: merge before q, k and v, un-merge after the output projection.

    Args:
        ratio: share of the tokens merged, at most 0.75; static, so that the arrays are truly shorter.
        latent_grid: height and width of the latents.
        key: of the random partition; None puts each destination at its cell's top left.
        max_downsample: transformers whose grid is smaller than the latents by more than this are left alone.
            SDXL has them at 2 and 4 only, so that 1, others' default, does nothing.
        share: how often a random partition is drawn.
        similarity: `cosine` or `euclidean`.

    Raises:
        MegError: a ratio outside [0, 0.75] or an unknown `share`.
    """
    if not 0 <= ratio <= 0.75:
        raise MegError(f"tome ratio {ratio}: from 0 to 0.75 are allowed")
    if share not in get_args(Share):
        raise MegError(f"tome share {share!r}: choose from {', '.join(get_args(Share))}")

    def token_merge(grid: Grid, number: int) -> Merge | None:
        downsample = max(-(-whole // part) for whole, part in zip(latent_grid, grid, strict=True))
        if ratio == 0 or downsample > max_downsample or min(grid) < 2:
            return None
        if key is None:
            parts = fixed_partition(grid, 1)
        else:
            parts = partition(key if share == "call" else jax.random.fold_in(key, number), grid, 1)

        def merge_tokens(x_BxNxD: Array) -> tuple[Array, Callable[[Array], Array]]:
            plan = match_partition(x_BxNxD, parts, ratio, grid, similarity=similarity)
            return merge(x_BxNxD, plan), lambda y_BxMxD: unmerge(y_BxMxD, plan)

        return merge_tokens

    return token_merge
