"""Latents as tokens and back: 2 x 2 patches, or the authors' strips of four pixels."""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Array, Shaped

from megjax.errors import MegError
from megjax.link.counts import Grid
from megjax.link.wire import WireLayout

Layout: TypeAlias = WireLayout
"""patch: true 2 x 2 patches. strip: 4 consecutive row-major pixels, told to stand on the patches' grid."""


def token_grid(height: int, width: int) -> Grid:
    """Return the token grid of a latent of `height` x `width`, the same for both layouts.

    Raises:
        MegError: an odd side.
    """
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise MegError(
            f"latent of {height} x {width}: both sides must be even and at least 2 to form tokens of 4 pixels"
        )
    return height // 2, width // 2


def to_tokens(z_HxWxC: Shaped[Array, "*b H W C"], layout: Layout = "patch") -> Shaped[Array, "*b N D"]:
    """Group a latent into N = HW/4 tokens of D = 4C values.

    Raises:
        MegError: an odd height or width.
    """
    *batch, height, width, channels = z_HxWxC.shape
    h, w = token_grid(height, width)
    if layout == "strip":
        return z_HxWxC.reshape(*batch, h * w, 4 * channels)
    z = z_HxWxC.reshape(*batch, h, 2, w, 2, channels).swapaxes(-4, -3)
    return z.reshape(*batch, h * w, 4 * channels)


def from_tokens(
    tokens_NxD: Shaped[Array, "*b N D"], grid: Grid, layout: Layout = "patch"
) -> Shaped[Array, "*b H W C"]:
    """Undo `to_tokens`: a latent of 2h x 2w pixels from the tokens of an h x w grid.

    Raises:
        MegError: tokens that do not fill the grid, or values that are not four pixels.
    """
    *batch, tokens, values = tokens_NxD.shape
    h, w = grid
    if tokens != h * w or values % 4:
        raise MegError(
            f"tokens {tokens} x {values} on a {h} x {w} grid: need {h * w} tokens and a multiple of 4 values"
        )
    if layout == "strip":
        return tokens_NxD.reshape(*batch, 2 * h, 2 * w, values // 4)
    z = tokens_NxD.reshape(*batch, h, w, 2, 2, values // 4).swapaxes(-4, -3)
    return z.reshape(*batch, 2 * h, 2 * w, values // 4)
