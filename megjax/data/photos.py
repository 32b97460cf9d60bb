"""Random crops of the photographs that ship with scikit-image, for the autoencoder alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from megjax.errors import MegError

TRAIN = (
    "chelsea.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "ihc.png",
    "camera.png", "brick.png", "grass.png", "gravel.png",
)  # fmt: skip
HELD_OUT = ("astronaut.png", "coffee.png")


def load_photos(names: tuple[str, ...] = TRAIN) -> list[np.ndarray]:
    """Read photographs of the installed scikit-image as (H, W, 3) uint8; no download.

    Raises:
        MegError: if the installed version has not these photographs.
    """
    # Found without an import, which takes a second.
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"  # pyright: ignore
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise MegError(f"{folder / missing[0]}: not in this scikit-image; `pip install -U scikit-image`")
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]


def random_crops(
    photos: list[np.ndarray], rng: np.random.Generator, batch: int, size: int
) -> Float[np.ndarray, "B S S 3"]:
    """Square crops at random scales (one to four picture pixels a pixel), flipped at random; in [0, 1]."""
    crops = np.empty((batch, size, size, 3), np.float32)
    for crop in crops:
        photo = photos[rng.integers(len(photos))]
        side = min(int(size * rng.uniform(1.0, 4.0)), *photo.shape[:2])
        top, left = (rng.integers(n - side + 1) for n in photo.shape[:2])
        patch = Image.fromarray(photo[top : top + side, left : left + side])
        pixels = np.asarray(patch.resize((size, size), Image.Resampling.BOX), np.float32) / 255
        crop[:] = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return crops
