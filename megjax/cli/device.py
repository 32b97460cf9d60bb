"""`megjax device PROMPT`: the device's half against a server, and where the time went."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import os
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megjax.checks import LARGEST_SEED, within
from megjax.cli.output import engineering, png_output, save
from megjax.data.pictures import to_uint8
from megjax.errors import MegError
from megjax.link.wire import WireDtype
from megjax.models import Options
from megjax.pipeline.device import load_device

if TYPE_CHECKING:
    from megjax.client import Answer, Channel, PictureRequest


@dataclasses.dataclass(frozen=True)
class Device:
    """Ask a server for a picture, receive its message and decode it here.

    Loads the decoder alone. Prints where the time went, as measured and as the model charges it.
    """

    prompt: tyro.conf.Positional[str]
    """What the picture shows."""
    server: str = "http://127.0.0.1:8000"
    """Where `megjax serve` runs."""
    token: str | None = None
    """If the server asks for one; MEGJAX_TOKEN in the environment is better: other users cannot see it."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("megjax.png")
    """Where the picture goes."""
    model: str = "tiny"
    """Whose decoder: `tiny`, a folder in diffusers layout, or a hub id; the server's own."""
    decoder: str | None = None
    """A distilled decoder by its name (`meg`), or `vae`; the model's own choice if not given."""
    negative_prompt: str = ""
    """What to lead away from."""
    seed: int = 0
    """Of the noise, the partition and the channel."""
    steps: int | None = None
    """Denoising steps; 8 if nobody chooses."""
    ratio: float | None = None
    """Merging ratio; 0.4 if nobody chooses."""
    limits: tuple[float, float] | None = None
    """Mean latency (s) and energy (kJ): the server's policy then chooses steps and ratio."""
    guidance: float | None = None
    """Of classifier-free guidance; the server's own if not given."""
    height: int | None = None
    """Of the picture in pixels; the model's own if not given, whatever the server's."""
    width: int | None = None
    """Likewise."""
    features: WireDtype = "float16"
    """How the features travel."""
    emulate: Literal["paper"] | None = None
    """Receive through an emulated channel: its rate, noise on the features, latency."""
    distance_m: float | None = None
    """Of the emulated channel; the paper's draws it, 200 to 300 m, if not given."""
    psnr_db: float = 10.0
    """Of the features on the emulated channel."""
    latency_s: float = 0.0
    """Before the first bit on the emulated channel."""
    deadline_s: float | None = None
    """The server gives up after so long; its own if not given."""
    patience_s: float = 60.0
    """How long to try again while the server is busy, restarts or cannot be reached."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the decoder's weights and activations."""


def device_command(args: tyro.conf.OmitArgPrefixes[Device]) -> None:
    """Ask a server for a picture, receive its message and decode it here."""
    client = _client()
    output = png_output(args.output)
    if (args.height is None) != (args.width is None):
        raise MegError("height and width: give both or neither")
    within(args, 0, LARGEST_SEED, "seed")
    if not args.patience_s >= 0:  # NaN, too, would wait for ever
        raise MegError(f"patience_s {args.patience_s}: a number from 0 on is allowed")
    size = None if args.height is None or args.width is None else (args.height, args.width)
    channel = None
    if args.emulate is not None:
        channel = client.emulated(
            args.emulate,
            args.seed,
            distance_m=args.distance_m,
            psnr_db=args.psnr_db,
            latency_s=args.latency_s,
        )
    elif args.distance_m is not None or args.latency_s or args.psnr_db != Device.psnr_db:
        raise MegError("distance-m, psnr-db, latency-s: of an emulated channel only; add --emulate paper")
    request: PictureRequest = _request(client, args)
    http = client.connect(args.server, args.token or os.environ.get("MEGJAX_TOKEN") or None)
    console = Console(stderr=True)
    with console.status("loading the decoder") as status:
        options = Options(dtype=args.dtype, param_dtype=args.dtype)
        device = load_device(args.model, options, decoder=args.decoder, size=size)
        request = dataclasses.replace(request, height=device.size[0], width=device.size[1])
        show = client.viewer(device)
        show(client.silence(device), 0, 0.0)
        status.update(escape(f"waiting for {args.server}"))

        async def ask() -> Answer:
            async with http:
                return await client.fetch(
                    http,
                    request,
                    most_bytes=client.largest_message_bytes(device),
                    channel=channel,
                    throughput=client.recall(args.server),
                    patience_s=args.patience_s,
                    on_retry=lambda reason, wait_s: status.update(
                        escape(f"{reason}; again in {wait_s:.1f} s"), spinner_style="yellow"
                    ),
                )

        answer = asyncio.run(ask())
        begun = time.perf_counter()
        image_HxWx3 = show(answer.message, args.seed, channel.psnr_db if channel else np.inf)
        decode_s = time.perf_counter() - begun
    if channel is None:
        # An emulated channel's rate says nothing of the network's.
        client.remember(args.server, answer.throughput)
    save(output, Image.fromarray(to_uint8(image_HxWx3)))
    Console().print(_table(args, answer, decode_s, channel))


def _client() -> ModuleType:
    """The client, whose HTTP library is an extra."""
    if importlib.util.find_spec("httpx") is None:
        raise MegError("megjax device needs httpx: pip install 'megjax[device]'")
    from megjax import client

    return client


def _request(client: ModuleType, args: Device) -> PictureRequest:
    steps, ratio, limits = args.steps, args.ratio, args.limits
    if limits is None:
        steps, ratio = 8 if steps is None else steps, 0.4 if ratio is None else ratio
    elif steps is not None or ratio is not None:
        raise MegError("limits: the policy chooses steps and ratio; give either limits or those")
    return client.PictureRequest(
        args.prompt,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        steps=steps,
        ratio=ratio,
        limits=None if limits is None else (limits[0], 1000.0 * limits[1]),
        guidance=args.guidance,
        dtype=args.features,
        deadline_s=args.deadline_s,
    )


def _table(args: Device, answer: Answer, decode_s: float, channel: Channel | None) -> Table:
    result, timings, modelled = answer.result, answer.result["timings"], answer.result["latency_s"]
    by = ", the policy's choice" if result.get("chosen_by") == "policy" else ""
    title = f"{args.output}: {result['steps']:g} steps, ratio {result['ratio']:.3g}{by}"
    table = Table("", "measured", "modelled", title=escape(title))
    served_s = timings["total_s"]

    def row(part: str, seconds: float, key: str | None = None) -> None:
        table.add_row(part, engineering(seconds, "s"), engineering(modelled[key], "s") if key else "")

    if answer.tries > 1:
        row(f"{answer.tries - 1} earlier tries", answer.retry_s)
    row("edge server", served_s, "es")
    for part, name in (
        ("queue", "queue_s"),
        ("text encoders", "text_s"),
        ("denoising", "denoise_s"),
        ("merging", "merge_s"),
    ):
        row(f"  {part}", timings[name])
    row("network, there and back", max(answer.wait_s - served_s, 0.0))
    row("message" if channel is None else "message, emulated channel", answer.transfer_s, "tx")
    row("device", decode_s, "ue")
    row("total", answer.retry_s + answer.wait_s + answer.transfer_s + decode_s, "total")
    table.add_section()
    table.add_row("payload", f"{result['payload_bits'] / 8:.0f} bytes, {result['tokens']:.0f} tokens")
    rate_bps = answer.throughput.rate_bps if channel is None else channel.rate_bps
    table.add_row("rate", "not measurable" if rate_bps is None else f"{rate_bps / 1e6:.3g} Mbit/s")
    table.caption = "modelled: the server's hardware profile at the rate that it was told, Eqs. (1)-(7)"
    return table
