"""The bits that a message costs on the air, Eq. (4): features and side information."""

from __future__ import annotations

from math import isqrt
from typing import Literal, TypeAlias, get_args

import jax
from jaxtyping import Int, ScalarLike

from megjax.errors import MegError
from megjax.link.counts import Count, Grid, Rounds, half, merged_counts, partition_sizes

PayloadRules: TypeAlias = Literal["default", "paper", "free"]
"""What side information costs: default the wire format's bits, paper 16 bits a merged token, free nothing.

`paper` and `free` (Table II) merge in one round, `default` in up to two.
"""


def rounds_of(rules: PayloadRules) -> Rounds:
    """Return the matching rounds that the rules merge in."""
    return 2 if rules == "default" else 1


def payload_bits(
    ratio: ScalarLike,
    tokens: int,
    channels: int,
    bits_per_scalar: int = 16,
    rules: PayloadRules = "default",
    *,
    grid: Grid | None = None,
) -> int | Int[jax.Array, ""]:
    """Return the bits of one message, Eq. (4): C' (N - R) b and the side information.

    Under `default` they are exactly those of the wire format's body; its header, 32 bytes, is not charged.

    Args:
        ratio: merging ratio r; a plain number or a traced scalar.
        tokens: N.
        channels: values of a token, C'.
        bits_per_scalar: b; 16 or, for int8, 8.
        rules: see `PayloadRules`.
        grid: token rows and columns; left out, N must be a square number.

    Raises:
        MegError: unknown rules; tokens that do not fill the grid, or are not square and have none; a static
            ratio beyond what can be merged.
    """
    if rules not in get_args(PayloadRules):
        raise MegError(f"payload rules {rules!r}: choose from {', '.join(get_args(PayloadRules))}")
    grid = _grid_of(tokens) if grid is None else grid
    if grid[0] * grid[1] != tokens:
        raise MegError(f"{tokens} tokens on a {grid[0]} x {grid[1]} grid: need {grid[0] * grid[1]}")
    counts = merged_counts(ratio, grid, rounds_of(rules))
    features = (tokens - sum(counts)) * channels * bits_per_scalar
    if rules == "free":
        return features
    if rules == "paper":
        return features + 16 * sum(counts)
    return features + 8 * side_information_bytes(counts, grid)


def side_information_bytes(counts: tuple[Count, ...], grid: Grid) -> Count:
    """Return the bytes of the wire format's index map for these merged counts (one entry a round).

    A round says who merges in one bit a source, unless none or all do, and where to in `destination_bits` for
    each merged token.
    """
    bits = 0
    for count in counts:
        sources, destinations = partition_sizes(grid)
        mask = sources * ((count > 0) & (count < sources))
        bits = bits + mask + count * destination_bits(destinations)
        grid = half(grid)
    return (bits + 7) // 8


def destination_bits(destinations: int) -> int:
    """Return the bits that name one of `destinations` tokens: ceil(log2 |B|)."""
    return max(destinations - 1, 0).bit_length()


def rgb_bits(height: int, width: int, bits_per_scalar: int = 16) -> int:
    """Return the bits of a raw RGB picture, what the centralised baseline sends."""
    return 3 * height * width * bits_per_scalar


def _grid_of(tokens: int) -> Grid:
    side = isqrt(tokens)
    if side * side != tokens:
        raise MegError(f"{tokens} tokens are not a square grid: pass `grid`")
    return side, side
