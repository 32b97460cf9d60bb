"""`megjax generate PROMPT`: a picture through the split, and what it cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megjax.cli.output import engineering, png_output, save
from megjax.data.pictures import to_uint8, upright_rgb
from megjax.errors import MegError
from megjax.link import channel, profiles
from megjax.link.cost import FrameCost, calls_per_step, frame_cost
from megjax.link.counts import largest_ratio
from megjax.link.features import FeatureRules, psnr_from_snr
from megjax.link.payload import rounds_of
from megjax.merging import token_grid
from megjax.models import Options
from megjax.pipeline import Generated, Pipeline, Request, check, generate, generate_each, load_pipeline
from megjax.pipeline.generate import MAX_RATIO, check_values, picture_size
from megjax.pipeline.split import Sampler, fewest_steps, steps_run
from megjax.pipeline.workload import workload
from megjax.rl.policy import act, load_policy

DEFAULT_STEPS, DEFAULT_RATIO = 8, 0.4
GRID_STEPS = (4, 6, 8, 12)
GRID_RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Generate a picture through the split and print what it cost.

    The edge server denoises and merges, the channel adds noise, the device un-merges and decodes. The clean
    reference has the same seed, 12 steps, nothing merged and a perfect channel.
    """

    prompt: tyro.conf.Positional[str]
    """What the picture shows. MEG-Tiny draws scenes such as "a red circle left of a blue square"."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out.png")
    """Where the picture goes, as PNG."""
    model: str = "tiny"
    """`tiny`, a folder in diffusers layout, or a hub id of an SDXL model."""
    steps: int | None = None
    """Denoising steps T; 8 if not given."""
    ratio: float | None = None
    """Merging ratio r, from 0 to 15/16, 0.4 if not given; the rules `paper` merge 3/4 at most, on odd grids
    more."""
    psnr_db: float | None = None
    """Signal-to-noise ratio of the features on the channel, inf is a perfect one; if not given, 10, under the
    rules `paper` 20, the authors' deviation of 0.1."""
    seed: int = 0
    """Of the noise, the partition of the tokens and the channel."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    guidance: float = 2.5
    """Of classifier-free guidance. A few-step student has its teacher's inside, so that 1, at half the calls,
    may draw better."""
    sampler: Sampler | None = None
    """`perflow` or `ddim`; by default the few-step student where the model has one."""
    tome_ratio: float = 0.0
    """Of the tokens merged inside the U-Net's self-attention, for speed."""
    init_image: Path | None = None
    """Picture to start from (image-to-image)."""
    strength: float = 0.6
    """How far to leave `init_image`: 1 forgets it."""
    height: int | None = None
    """Of the picture in pixels; the model's own if not given."""
    width: int | None = None
    """Likewise."""
    grid: bool = False
    """Draw a contact sheet over steps and ratios instead of one picture."""
    distance_m: float = 250.0
    """From the server to the device; gives the link's rate."""
    snr_db: float | None = None
    """The link's signal-to-noise ratio, in place of the distance."""
    tie_psnr: bool = False
    """Let the features meet the link's signal-to-noise ratio, in place of `psnr_db`."""
    policy: Path | None = None
    """File of a policy that chooses steps and ratio for the link, from `python -m train.policy`."""
    limits: tuple[float, float] | None = None
    """Mean latency (s) and energy (kJ) that a policy conditioned on its limits is to keep."""
    profile: str = "paper"
    """Hardware profile: a name such as `a100`, or a JSON file that `python -m eval.profile` wrote."""
    rules: FeatureRules = "default"
    """`paper` for the authors' token layout, noise and side information."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations."""


def generate_command(args: tyro.conf.OmitArgPrefixes[Generate]) -> None:
    """Generate a picture through the split and print what it cost."""
    output = png_output(args.output)
    snr = _link_snr(args)
    chosen = [f"{name} {value}" for name in ("steps", "ratio") if (value := getattr(args, name)) is not None]
    for chooser, given in (("policy", args.policy is not None), ("grid", args.grid)):
        if given and chosen:
            raise MegError(f"{', '.join(chosen)}: --{chooser} chooses steps and ratio; leave it out")
    if args.grid and args.policy is not None:
        raise MegError("grid: draws all steps and ratios, and --policy chooses one; leave one out")
    if args.policy is not None:
        choice = act(load_policy(args.policy), float(channel.to_db(snr)), limits=args.limits)
        steps, ratio = choice.steps, min(choice.ratio, MAX_RATIO[args.rules])
    elif args.limits is not None:
        raise MegError("limits: only a policy keeps them; give one with --policy")
    else:
        steps = DEFAULT_STEPS if args.steps is None else args.steps
        ratio = DEFAULT_RATIO if args.ratio is None else args.ratio
    request = Request(
        args.prompt,
        negative_prompt=args.negative_prompt,
        steps=steps,
        ratio=ratio,
        psnr_db=float(psnr_from_snr(snr)) if args.tie_psnr else args.psnr_db,
        guidance=args.guidance,
        seed=args.seed,
        rules=args.rules,
        sampler=args.sampler,
        tome_ratio=args.tome_ratio,
        strength=args.strength,
        height=args.height,
        width=args.width,
    )
    profile = profiles.load(args.profile)
    # What needs no model, before one is loaded.
    check_values(request)
    picture = None if args.init_image is None else _read_picture(args.init_image)
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if args.grid:
        columns.insert(2, MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)

        def stage(name: str) -> None:
            progress.update(task, description=name)

        options = Options(dtype=args.dtype, param_dtype=args.dtype)
        pipeline = load_pipeline(args.model, options, on_part=lambda part: stage(f"loading {part}"))
        drawn = _grid_steps(pipeline, args.sampler) if args.grid else (steps,)
        check(dataclasses.replace(request, steps=drawn[0]), pipeline)
        size = picture_size(pipeline, request)
        start = None if picture is None else _fitted(picture, size)
        grid = token_grid(*(side // pipeline.vae_decoder.config.downsampling for side in size))
        most = largest_ratio(grid, rounds_of(args.rules))  # what more asks for is not merged
        request = dataclasses.replace(request, ratio=min(ratio, most))
        if args.grid:
            requests = [
                dataclasses.replace(request, steps=steps, ratio=min(ratio, most))
                for steps in drawn
                for ratio in GRID_RATIOS
            ]
            progress.update(task, total=len(requests))
            results = []
            for result in generate_each(pipeline, requests, start, on_stage=stage):
                results.append(result)
                progress.advance(task)
            save(output, _contact_sheet(requests, results))
            progress.console.print(f"{output}: {len(requests)} pictures", highlight=False, markup=False)
            return
        result = generate(pipeline, request, start, on_stage=stage)
        stage("counting FLOPs")
        work = workload(pipeline, size, args.tome_ratio, calls_per_step(args.guidance))
        rate_bps = channel.rate_bps(snr)
        cost = frame_cost(
            profiles.compute(profile, work, image_to_image=start is not None, tome=bool(args.tome_ratio)),
            int(steps_run(steps, args.strength if start is not None else 1.0)),
            result.payload_bits,
            rate_bps,
            float(channel.tx_power_w()),
        )
    save(output, Image.fromarray(to_uint8(result.image_HxWx3)))
    Console().print(_table(request, args.profile, result, cost, float(rate_bps), output))


def _link_snr(args: Generate) -> jax.Array:
    """Return the link's linear signal-to-noise ratio."""
    if args.snr_db is not None:
        if not -100 <= args.snr_db <= 200:
            raise MegError(f"snr_db {args.snr_db}: from -100 to 200 dB are allowed")
        return channel.from_db(args.snr_db)
    if not 1 <= args.distance_m <= 1e5:
        raise MegError(f"distance_m {args.distance_m}: from 1 to 100000 m are allowed")
    return channel.snr(args.distance_m)


def _grid_steps(pipeline: Pipeline, sampler: Sampler | None) -> tuple[int, ...]:
    """Return the sheet's numbers of steps, those that the sampler takes."""
    fewest = fewest_steps(pipeline, sampler)
    return tuple(T for T in GRID_STEPS if fewest <= T) or (fewest,)


def _table(
    request: Request, profile: str, result: Generated, cost: FrameCost, rate_bps: float, output: Path
) -> Table:
    title = f"{output}: {request.steps} steps, ratio {request.ratio:g}"
    table = Table("", "latency", "energy", title=escape(title))
    for part, seconds, joules in (
        ("edge server", cost.latency_es_s, cost.energy_es_j),
        (f"channel, {rate_bps / 1e6:.3f} Mbit/s", cost.latency_tx_s, cost.energy_tx_j),
        ("device", cost.latency_ue_s, cost.energy_ue_j),
        ("total", cost.latency_s, cost.energy_j),
    ):
        table.add_row(part, engineering(float(seconds), "s"), engineering(float(joules), "J"))
    table.add_section()
    table.add_row("payload", f"{result.payload_bits} bits", f"{result.tokens} tokens")
    table.add_row("against the reference", f"MSE {result.mse:.5f}", f"PSNR {result.psnr_db:.2f} dB")
    table.caption = escape(f"latency and energy modelled: hardware profile {profile}, Eqs. (1)-(7)")
    return table


def _contact_sheet(requests: list[Request], results: list[Generated]) -> Image.Image:
    """Draw pictures over steps (rows) and ratios (columns), each with its PSNR against the reference."""
    margin, label = 4, 14
    height, width = results[0].image_HxWx3.shape[:2]
    # Small pictures would be smaller than their labels.
    zoom = max(1, 128 // width)
    height, width = height * zoom, width * zoom
    size = (
        len(GRID_RATIOS) * (width + margin) + margin,
        len(requests) // len(GRID_RATIOS) * (height + label + margin) + margin,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (request, result) in enumerate(zip(requests, results, strict=True)):
        row, column = divmod(i, len(GRID_RATIOS))
        x, y = margin + column * (width + margin), margin + row * (height + label + margin)
        title = f"T {request.steps}, r {request.ratio:g}, {result.psnr_db:.1f} dB"
        draw.text((x, y), title, fill="black")
        picture = Image.fromarray(to_uint8(result.image_HxWx3))
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y + label))
    return sheet


def _read_picture(path: Path) -> Image.Image:
    """Read a picture to start from."""
    try:
        with Image.open(path) as file:
            return upright_rgb(file)
    except FileNotFoundError:
        raise MegError(f"init-image {path}: no such file") from None
    # Pillow's decoders raise SyntaxError and ValueError for broken files too.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MegError(f"init-image {path}: not a readable picture ({error})") from None


def _fitted(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Crop to the aspect of `size` (height, width) and resize to it; in [0, 1]."""
    height, width = size
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32) / 255
