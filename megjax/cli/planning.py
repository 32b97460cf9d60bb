"""Compiles what `megjax plan` asks for and prints it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megjax.distill.diffuser import DiffuserConfig
from megjax.files import write_file
from megjax.models import Options
from megjax.pipeline.load import Pipeline
from megjax.plan.account import Account
from megjax.plan.chips import GIB, Topology, topology
from megjax.plan.config import PlanConfig
from megjax.plan.programs import (
    Lowered,
    ProgramName,
    backbone,
    lower_decoding,
    lower_sampling,
    lower_training,
)
from megjax.plan.report import Report, advice, compile_report, largest_images
from megjax.training.sharding import make_mesh

TITLES = {"train": "distillation step", "sample": "sampling, {} guided steps", "decode": "decoding"}


def plan(args: PlanConfig) -> bool:
    """Compile the programs and print a table for each; returns whether all fit."""
    chips = topology(args.topology)
    pipeline = backbone(args.backbone, Options("bfloat16", "bfloat16"))
    names: tuple[ProgramName, ...] = (
        ("train", "sample", "decode") if args.program == "all" else (args.program,)
    )
    figures, fits = {}, True
    for name in names:
        report, did = _compiled(args, name, pipeline, chips, args.images)
        largest = other = None
        if report.fits:
            if args.largest:
                twice, _ = _compiled(args, name, pipeline, chips, 2 * args.images)
                # The compiler does not say how much a program needs that is too large for it.
                other = None if twice.activations is None else twice
            largest = largest_images(report, other)
        fits &= report.fits
        hint = advice(
            report,
            chips.chip,
            remat=args.remat,
            fsdp=_parts(args, len(chips.devices)),
            accumulate=args.accumulate,
            largest=largest,
        )
        how = "an estimate from this one, on the safe side" if other is None else "two compilations"
        fitting = None if largest is None else f"{largest} ({how})"
        Console().print(_table(args, report, fitting, hint))
        if not report.fits:
            line = f"does not fit: {report.missing / GIB:.2f} GiB a device too much. Change: {hint}"
            print(f"megjax: {name}: {line}", file=sys.stderr)
        figures[name] = _figures(report, did, largest, hint)
    if args.json is not None:
        write_file(args.json, json.dumps(figures, indent=2) + "\n")
    return fits


def _parts(args: PlanConfig, devices: int) -> int:
    return devices // (max(args.replicas, 1) * max(args.tensor, 1)) if args.fsdp == -1 else args.fsdp


def _compiled(
    args: PlanConfig, name: ProgramName, pipeline: Pipeline, chips: Topology, images: int
) -> tuple[Report, Account | None]:
    with _progress(f"{args.topology}: compiling {name}, {images} a device"):
        lowered = _lowered(args, name, pipeline, chips.devices, images)
        return compile_report(name, lowered, chips, quick=args.quick)


def _lowered(
    args: PlanConfig, name: ProgramName, pipeline: Pipeline, devices: list[Any], images: int
) -> Lowered:
    if name == "sample":
        return lower_sampling(pipeline, devices[0], batch=images, steps=args.steps)
    if name == "decode":
        return lower_decoding(pipeline, devices[0], batch=images)
    mesh = make_mesh(args.replicas, args.fsdp, args.tensor, devices)
    config = DiffuserConfig(
        model=args.backbone,
        batch=images * mesh.shape["data"] * mesh.shape["fsdp"],
        accumulate=args.accumulate,
        dtype="bfloat16",
        remat=args.remat,
        lora_rank=args.lora_rank,
        optimizer=args.optimizer,
        moments=args.moments,
        offload_ema=args.offload_ema,
        solver_steps=args.solver_steps,
        replicas=args.replicas,
        fsdp=args.fsdp,
        tensor=args.tensor,
    )
    return lower_training(config, pipeline, devices)


@contextmanager
def _progress(text: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        start = time.perf_counter()
        console.print(f"{text} ...", highlight=False)
        yield
        console.print(f"{text}: {time.perf_counter() - start:.0f} s", highlight=False)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def _table(args: PlanConfig, report: Report, fitting: str | None, hint: str) -> Table:
    title = TITLES[report.program].format(args.steps)
    table = Table("a device", "", title=f"{args.backbone}, {report.topology}: {title}")
    for part, size in report.parts.items():
        table.add_row(part, f"{size / GIB:.3f} GiB")
    if report.activations is not None:
        table.add_row("activations, gradients, gathered", f"{report.activations / GIB:.3f} GiB")
    table.add_row("peak", f"{report.peak / GIB:.2f} of {report.hbm / GIB:.2f} GiB")
    if report.activations is not None:
        table.add_section()
        table.add_row("pictures", f"{report.images:g}")
        table.add_row("computed", f"{report.flops / 1e12:.2f} TFLOP, {report.compute_s:.3f} s")
        table.add_row("memory", f"{report.bytes_accessed / 1e9:.1f} GB, {report.memory_s:.3f} s")
        table.add_row("both, operation by operation", f"{report.work_s:.3f} s")
        if report.collective_bytes:
            table.add_row("sent", f"{report.collective_bytes / 1e9:.2f} GB, {report.collective_s:.3f} s")
        table.add_row("time at least", f"{report.seconds:.3f} s, bound by {report.bound}")
        if report.kernels:
            table.add_row("kernels without an estimate", f"{report.kernels:g}")
        table.add_row("compiled in", f"{report.compile_s:.0f} s")
    table.add_section()
    if fitting is not None:
        table.add_row("pictures that fit", fitting)
    table.add_row("advice", hint)
    return table


def _figures(report: Report, did: Account | None, largest: int | None, hint: str) -> dict[str, Any]:
    figures = dataclasses.asdict(report) | {
        "fits": report.fits,
        "missing": report.missing,
        "seconds": report.seconds,
        "bound": report.bound,
        "largest_images": largest,
        "advice": hint,
        "jax": jax.__version__,
    }
    if did is not None:
        gathers = [c for c in did.collectives if c.opcode == "all-gather"]
        figures |= {
            "largest_gather_bytes": max((c.output_bytes for c in gathers), default=0),
            "gathered_outside_loops": sorted(
                ([c.output_bytes, c.where] for c in gathers if not c.in_loop), reverse=True
            ),
            "collectives": {
                name: sum(c.runs * c.sent_bytes for c in did.collectives if c.opcode == name)
                for name in sorted({c.opcode for c in did.collectives})
            },
        }
    return figures
