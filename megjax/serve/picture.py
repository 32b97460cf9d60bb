"""The device's half on the server, for the page: the picture that a device would show and its reference."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from megjax.data.pictures import to_uint8
from megjax.errors import MegError
from megjax.pipeline import Pipeline
from megjax.pipeline.device import device_of
from megjax.pipeline.generate import REFERENCE_STEPS
from megjax.pipeline.split import decode, finite
from megjax.pipeline.viewer import Show, viewer
from megjax.serve.engine import Size, Task, latents


class Shown(NamedTuple):
    """What the page shows.

    Args:
        image: the device's picture, PNG.
        reference: T = 12, same seed and guidance, nothing merged, perfect channel, undistilled decoder; PNG.
        mse: between both.
        psnr_db: the same in dB; None where they are equal.
    """

    image: bytes
    reference: bytes
    mse: float
    psnr_db: float | None


def show(pipeline: Pipeline, each: Sequence[tuple[Task, bytes, float]], batch: int) -> list[Shown | MegError]:
    """Receive messages through an emulated channel as a device would.

    Args:
        pipeline: the backbone.
        each: tasks, their messages, and the PSNR in dB of the features on the channel.
        batch: see `megjax.serve.engine.messages`.

    Returns:
        Each task's pictures, or why it has none.
    """
    tasks = [dataclasses.replace(task, steps=REFERENCE_STEPS) for task, _, _ in each]
    z_BxHxWxC, _ = latents(pipeline, tasks, batch)
    # The device makes one picture at a time, and so does its half here.
    look = _viewer(pipeline, tasks[0].size)
    shown: list[Shown | MegError] = []
    for i, (task, message, psnr_db) in enumerate(each):
        try:
            image = look(message, task.seed, psnr_db)
            decoded = decode(pipeline, pipeline.params["vae_decoder"], z_BxHxWxC[i : i + 1])
            reference = finite(np.asarray(decoded[0]))
        except MegError as error:
            shown.append(error)
            continue
        mse = float(np.mean(np.square(image - reference), dtype=np.float64))
        shown.append(Shown(png(image), png(reference), mse, -10 * math.log10(mse) if mse else None))
    return shown


@functools.lru_cache(maxsize=16)
def _viewer(pipeline: Pipeline, size: Size) -> Show:
    return viewer(device_of(pipeline, size))


def png(image_HxWx3: np.ndarray) -> bytes:
    """A picture in [0, 1] as PNG."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image_HxWx3)).save(file, format="PNG")
    return file.getvalue()
