"""What commands have in common: where a picture goes, and numbers for readers."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image

from megjax.errors import MegError
from megjax.files import replacing, writable


def png_output(path: Path) -> Path:
    """Return `path` if a PNG can be written there.

    Raises:
        MegError: another suffix; see `megjax.files.writable`.
    """
    if path.suffix.lower() != ".png":
        raise MegError(f"output {path}: give a file name that ends in .png")
    return writable(path)


def save(path: Path, picture: Image.Image) -> None:
    """Write a whole PNG."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def engineering(value: float, unit: str) -> str:
    """Write a number in three digits with a prefix from n to k."""
    if value == 0:
        return f"0 {unit}"
    if not math.isfinite(value):
        return f"{value} {unit}"
    thousand = min(max(math.floor(math.log10(abs(value)) / 3), -3), 1)
    return f"{value / 1000.0**thousand:.3g} {['n', 'µ', 'm', '', 'k'][thousand + 3]}{unit}"
