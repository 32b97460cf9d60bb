"""What commands have in common: where a picture goes, and numbers for readers."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from megjax.errors import MegError


def writable(path: Path) -> Path:
    """Refuse an output that cannot be written before anything is computed."""
    folder = path.parent
    if path.suffix.lower() != ".png":
        raise MegError(f"output {path}: give a file name that ends in .png")
    if not folder.is_dir():
        raise MegError(f"output {path}: there is no folder {folder}; create it first")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise MegError(f"output {path}: not writable; choose another file")
    return path


def save(path: Path, picture: Image.Image) -> None:
    """Write a PNG beside its place, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    temporary.replace(path)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Round a picture in [0, 1] to 8 bits."""
    return np.round(image * 255).astype(np.uint8)


def engineering(value: float, unit: str) -> str:
    """Write a number in three digits with a prefix from n to k."""
    if value == 0:
        return f"0 {unit}"
    thousand = min(max(math.floor(math.log10(abs(value)) / 3), -3), 1)
    return f"{value / 1000.0**thousand:.3g} {['n', 'µ', 'm', '', 'k'][thousand + 3]}{unit}"
