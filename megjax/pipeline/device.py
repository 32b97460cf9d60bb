"""The device's half as one artifact: what a message carries in, a picture out, weights inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array

from megjax import merging, weights
from megjax.errors import MegError
from megjax.link.counts import Grid
from megjax.merging.message import Carried, carried_shapes, rebuild_plan
from megjax.models import Network, Options, Params, UNetConfig, VAEConfig, from_dict, vae_decoder, vae_encoder
from megjax.pipeline.int8 import dequantised
from megjax.pipeline.load import DECODERS, Pipeline, distilled_decoder, open_backbone

PLATFORMS = ("cpu", "cuda", "tpu")


class Device(NamedTuple):
    """The device's decoder.

    Args:
        decoder: the network.
        params: its parameters, or `megjax.pipeline.int8.quantised` of them.
        size: height and width of its pictures; pixels.
    """

    decoder: Network
    params: Params
    size: tuple[int, int]


def load_device(
    model: str | Path = "tiny",
    options: Options = Options(),
    *,
    decoder: str | None = None,
    size: tuple[int, int] | None = None,
) -> Device:
    """Load a backbone's decoder and nothing else of it.

    Args:
        model: an embedded backbone, a folder in diffusers layout or a hub id.
        options: the parameters are converted to its `param_dtype`.
        decoder: a distilled one by its name (`meg`), or `vae`; the backbone's own choice unless given.
        size: of the pictures, pixels; the backbone's own unless given.

    Raises:
        WeightsError: for a folder that is missing, incomplete or of another kind than SDXL's.
        MegError: no such decoder, or a size that is no multiple of a token's.
    """
    folder = open_backbone(model, parts=("vae",))

    def config(cls: Any, part: str) -> Any:
        return from_dict(cls, folder.configs[part], origin=str(folder.path / part / "config.json"))

    vae = config(VAEConfig, "vae")
    network = vae_decoder(vae, options)
    distilled = folder.path / DECODERS
    names = sorted(p.name for p in distilled.glob("[!.]*") if p.is_dir())
    name = decoder or ("meg" if "meg" in names else "vae")
    if name not in ("vae", *names):
        raise MegError(f"decoder {name!r}: {model} has {', '.join(['vae', *names])}")
    side = config(UNetConfig, "unet").sample_size * vae.downsampling
    height, width = size or (side, side)
    token = 2 * vae.downsampling
    if height < token or width < token or height % token or width % token:
        raise MegError(f"size {height} x {width}: both must be multiples of {token}, a token's pixels")
    if name == "vae":
        shapes = {**vae_encoder(vae, options).shapes, **network.shapes}
        both = weights.load(folder.path / "vae", shapes, dtype=options.param_dtype)
        params = {key: both[key] for key in network.shapes}
    else:
        network = distilled_decoder(distilled / name, network, options)
        params = weights.load(distilled / name, network.shapes, dtype=options.param_dtype)
    return Device(network, params, (height, width))


def device_of(pipeline: Pipeline, size: tuple[int, int]) -> Device:
    """The decoder that a pipeline's device runs.

    Args:
        pipeline: both halves.
        size: height and width of the pictures; pixels.
    """
    params = pipeline.device_decoder
    return Device(pipeline.decoder_of(params), params, size)


def token_grid(device: Device) -> Grid:
    """Rows and columns of the tokens that the device receives."""
    scale = device.decoder.config.downsampling
    return merging.token_grid(device.size[0] // scale, device.size[1] // scale)


def receiver(device: Device, layout: merging.Layout = "patch") -> Callable[[Carried], Array]:
    """Un-merge and decode, Eq. (20), at any ratio: a message's content -> a picture (H, W, 3) in [0, 1].

    Args:
        device: its decoder.
        layout: how the tokens make up the latent.
    """
    grid = token_grid(device)

    def receive(content: Carried) -> Array:
        tokens = merging.unmerge(content["features"], rebuild_plan(content, grid))
        z = merging.from_tokens(tokens[None], grid, layout)
        return jnp.clip(device.decoder(dequantised(device.params), z)[0], 0.0, 1.0)

    return receive


def export_device(
    device: Device, platforms: Sequence[str] = PLATFORMS, layout: merging.Layout = "patch"
) -> bytes:
    """The device's program as portable StableHLO, for `jax.export.deserialize`; weights inside.

    Args:
        device: its decoder.
        platforms: that it is to run on.
        layout: how the tokens make up the latent.

    Raises:
        MegError: an unknown platform, or none.
    """
    if not platforms or set(platforms) - set(PLATFORMS):
        raise MegError(f"platforms {', '.join(platforms)}: choose from {', '.join(PLATFORMS)}")
    values = 4 * device.decoder.config.latent_channels
    shapes = carried_shapes(token_grid(device), values)
    exported = export.export(jax.jit(receiver(device, layout)), platforms=tuple(platforms))(shapes)
    return bytes(exported.serialize())


def picture_mse(device: Device, other: Device, pictures: int = 8) -> float:
    """Mean squared difference between two devices' pictures of the same random latents.

    Args:
        device: one.
        other: with the same network, or one of other parameters.
        pictures: compared, one at a time.
    """
    config, (height, width) = device.decoder.config, device.size
    scale = config.downsampling

    @jax.jit
    def error(key: Array) -> Array:
        shape = (1, height // scale, width // scale, config.latent_channels)
        z = jax.random.normal(key, shape, jnp.float32)
        first, second = (
            jnp.clip(d.decoder(dequantised(d.params), z), 0.0, 1.0).astype(jnp.float32)
            for d in (device, other)
        )
        return jnp.mean(jnp.square(first - second))

    return float(np.mean([error(key) for key in jax.random.split(jax.random.key(0), pictures)]))
