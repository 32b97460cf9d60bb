"""Pictures as files have them, made alike."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps


def to_uint8(image: Float[np.ndarray, "*s"]) -> UInt8[np.ndarray, "*s"]:
    """Round pictures in [0, 1] to 8 bits; what lies outside is clipped, as a sampler's raw pictures may."""
    return np.round(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a picture upright and in 8-bit RGB.

    Args:
        image: an open one, of any mode.

    Raises:
        OSError: not a whole picture.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip greys of 16 bits, not scale them: nearly all would be white.
        grey_HxW = np.clip(np.asarray(image, np.float64), 0, 65535) / 257
        image = Image.fromarray(np.round(grey_HxW).astype(np.uint8))
    return image.convert("RGB")
