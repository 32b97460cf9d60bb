"""The stage of a sane centralised baseline: pictures as PNG and as JPEG at quality 90."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from eval.metrics import mse, ssim
from eval.suite.config import SuiteConfig
from eval.suite.context import Context, Stage
from eval.suite.measure import reference
from megjax.data.photos import HELD_OUT, TRAIN, load_photos
from megjax.errors import MegError

QUALITY = 90
GREY = ("camera.png", "brick.png", "grass.png", "gravel.png")


def codecs(config: SuiteConfig) -> Stage:
    """Return the stage of bits a pixel and errors, of the model's references and of photographs."""
    return Stage("PNG and JPEG", {"quality": QUALITY}, _codecs, (reference(config),))


def _codecs(context: Context, settings: Mapping[str, Any], references: Any) -> dict[str, Any]:
    images = references["images"]
    pixels = [np.round(np.clip(image, 0, 1) * 255).astype(np.uint8) for image in images]
    found = [encode(image, settings["quality"]) for image in pixels]
    jpeg = np.stack([image for *_, image in found]).astype(np.float32) / 255
    png = np.stack(pixels).astype(np.float32) / 255
    area = pixels[0].shape[0] * pixels[0].shape[1]
    return {
        "own": {
            "png_bits": np.asarray([8.0 * len(png) for png, _, _ in found]) / area,
            "jpeg_bits": np.asarray([8.0 * len(jpeg) for _, jpeg, _ in found]) / area,
            "png_mse": mse(png, images),
            "jpeg_mse": mse(jpeg, images),
            "jpeg_ssim": ssim(jpeg, images),
        },
        "photographs": _photographs(settings["quality"]),
    }


def encode(image: np.ndarray, quality: int) -> tuple[bytes, bytes, np.ndarray]:
    """Return a picture's PNG, its JPEG, and what the JPEG decodes to."""
    picture, png, jpeg = Image.fromarray(image), io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    picture.save(jpeg, "JPEG", quality=quality)
    return png.getvalue(), jpeg.getvalue(), np.asarray(Image.open(io.BytesIO(jpeg.getvalue())))


def _photographs(quality: int) -> dict[str, Any] | None:
    """Return bits a pixel of scikit-image's colour photographs, at their own sizes; None without them."""
    names = [name for name in TRAIN + HELD_OUT if name not in GREY]
    try:
        photographs = load_photos(tuple(names))
    except MegError:
        return None
    found = [encode(image, quality) for image in photographs]
    area = [image.shape[0] * image.shape[1] for image in photographs]
    return {
        "names": names,
        "png_bits": np.asarray([8.0 * len(png) / n for (png, _, _), n in zip(found, area, strict=True)]),
        "jpeg_bits": np.asarray([8.0 * len(jpeg) / n for (_, jpeg, _), n in zip(found, area, strict=True)]),
    }
