"""`megjax export-ue`: the device's decoder as one file that runs without MegJAX."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from megjax.errors import MegError
from megjax.files import writable, write_file
from megjax.merging import Layout, carried_shapes
from megjax.models import Options
from megjax.pipeline.device import export_device, load_device, picture_mse, token_grid
from megjax.pipeline.int8 import quantised


@dataclasses.dataclass(frozen=True)
class ExportUe:
    """Write the device's half as a portable StableHLO artifact, its weights inside.

    It un-merges and decodes one message at any ratio. `jax.export.deserialize(bytes).call(content)` runs it,
    with no MegJAX installed.
    """

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("decoder.stablehlo")
    """Where it goes."""
    model: str = "tiny"
    """`tiny`, a folder in diffusers layout, or a hub id of an SDXL model."""
    decoder: str | None = None
    """A distilled decoder by its name (`meg`), or `vae`; the model's own choice if not given."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """That it is to run on."""
    layout: Layout = "patch"
    """How tokens make up the latent; `strip` is the paper's."""
    height: int | None = None
    """Of the pictures in pixels; the model's own if not given."""
    width: int | None = None
    """Likewise."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations."""
    weights: Literal["same", "int8"] = "same"
    """Kernels in `dtype`, or in int8 with one scale per output channel (extra `int8`)."""


def export_ue_command(args: tyro.conf.OmitArgPrefixes[ExportUe]) -> None:
    """Write the device's half as a portable StableHLO artifact, its weights inside."""
    writable(args.output)
    if (args.height is None) != (args.width is None):
        raise MegError("height and width: give both or neither")
    size = None if args.height is None or args.width is None else (args.height, args.width)
    device = load_device(args.model, Options(args.dtype, args.dtype), decoder=args.decoder, size=size)
    error = None
    if args.dtype == "float16" and not math.isfinite(picture_mse(device, device, 1)):
        raise MegError("float16: the decoder overflows in it, as SDXL's own does; choose --dtype bfloat16")
    if args.weights == "int8":
        rounded = device._replace(params=quantised(device.params))
        error, device = picture_mse(device, rounded), rounded
    artifact = export_device(device, args.platforms, args.layout)
    write_file(args.output, artifact)
    console = Console()
    if error is not None:
        console.print(f"int8 weights change its pictures by an MSE of {error:.2e}", highlight=False)
    size_mb, where = len(artifact) / 1e6, ", ".join(args.platforms)
    console.print(f"{args.output}: {size_mb:.1f} MB for {where}; reads", highlight=False, markup=False)
    for name, shape in carried_shapes(token_grid(device), 4 * device.decoder.config.latent_channels).items():
        console.print(f"  {name}: {shape.dtype}{list(shape.shape)}", highlight=False, markup=False)
