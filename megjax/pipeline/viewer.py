"""A message to a picture, with nothing of the backbone but its decoder: Eqs. (19)-(20)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from megjax.errors import MegError
from megjax.link import wire
from megjax.link.channel import from_db
from megjax.merging.message import Carried, carried, carried_shapes
from megjax.pipeline.device import Device, receiver, token_grid
from megjax.pipeline.split import request_keys

Show = Callable[[bytes, int, float], np.ndarray]
"""(message, seed, psnr_db) -> picture (H, W, 3) in [0, 1]."""


def largest_message_bytes(device: Device) -> int:
    """Bytes that no message for this decoder exceeds: nothing merged, 16 bits a scalar, a bit a token."""
    rows, columns = token_grid(device)
    tokens = rows * columns
    return wire.HEADER_BYTES + 2 * tokens * 4 * device.decoder.config.latent_channels + tokens


def viewer(device: Device) -> Show:
    """Return what makes a picture of a message: the channel's noise, un-merging, the decoder.

    One compiled program serves every ratio, dtype and noise level. At a request's seed and PSNR the picture
    is that of `megjax.pipeline.split.send` and `decode`, up to the program's rounding.

    The returned function raises:
        WireFormatError: a damaged message, or none.
        MegError: a message for pictures of another size or latent, a picture that is not finite.

    Args:
        device: from `megjax.pipeline.device.load_device`.
    """
    grid, values = token_grid(device), 4 * device.decoder.config.latent_channels

    @functools.cache
    def program(layout: wire.WireLayout) -> Callable[..., Array]:
        receive = receiver(device, layout)

        @jax.jit
        def show(
            content: Carried,
            count: Int[Array, ""],
            power: Float[Array, ""],
            key: Key[Array, ""],
            psnr_db: Float[Array, ""],
        ) -> Array:
            x_NxD = content["features"]
            sigma = from_db(-psnr_db / 2.0) * jnp.sqrt(power)
            valid_N = jnp.arange(x_NxD.shape[0]) < count
            noise_NxD = jnp.where(
                valid_N[:, None], sigma * jax.random.normal(key, x_NxD.shape, x_NxD.dtype), 0.0
            )
            return receive({**content, "features": x_NxD + noise_NxD})

        return show

    def picture(message: bytes, seed: int, psnr_db: float) -> np.ndarray:
        decoded = wire.decode(message)
        width = decoded.features_MxD.shape[1]
        if decoded.grid != grid or width != values:
            raise MegError(
                f"message of {decoded.grid[0]} x {decoded.grid[1]} tokens of {width} values: this decoder "
                f"shows {grid[0]} x {grid[1]} of {values}; load it for the size that was asked for"
            )
        image_HxWx3 = program(decoded.layout)(
            carried(decoded),
            jnp.int32(len(decoded.features_MxD)),
            jnp.float32(decoded.power),
            request_keys(seed).channel,
            jnp.float32(psnr_db),
        )
        if not np.isfinite(image_HxWx3 := np.asarray(image_HxWx3)).all():
            raise MegError("the picture is not finite: the message's features are beyond the decoder")
        return image_HxWx3

    return picture


def silence(device: Device) -> bytes:
    """A message of zeros, to compile the decoder with before the first one is there."""
    grid = token_grid(device)
    values = 4 * device.decoder.config.latent_channels
    shapes = carried_shapes(grid, values)
    index_map = [(np.zeros(shapes["merged_1"].shape, bool), np.zeros(shapes["best_1"].shape, np.int32))]
    features = np.zeros((grid[0] * grid[1], values), np.float32)
    return wire.encode(features, index_map, grid=grid, ratio=0.0, key_data=np.zeros(2, np.uint32))
