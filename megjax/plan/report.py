"""What one device needs to run a program, how long it should take, and what to change."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax

from megjax.plan.account import Account, account
from megjax.plan.chips import GIB, QUICK, TPU_OPTIONS, Chip, Topology, parse, sizes_of
from megjax.plan.programs import Lowered


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one device of a topology.

    Args:
        program: `train`, `sample` or `decode`.
        topology: that it was compiled for.
        devices: that share the work.
        images: pictures a device.
        parts: bytes of the arguments, by name.
        activations: bytes that the program needs besides, gradients and gathered parameters included; None
            where the compiler gave up before it knew.
        peak: bytes at most at one time.
        hbm: bytes that there are.
        flops: of one run, or, sampling, of all its steps.
        bytes_accessed: read and written.
        collective_bytes: sent to the neighbours.
        kernels: kernels run, which have no estimate.
        compute_s: matrix products and the rest at the chip's rate.
        memory_s: bytes at the memory's rate.
        work_s: operation by operation, the longer of both.
        collective_s: bytes sent at the links' rate.
        compile_s: seconds that compiling took.
    """

    program: str
    topology: str
    devices: int
    images: int
    parts: dict[str, int]
    activations: int | None
    peak: int
    hbm: int
    flops: float = 0.0
    bytes_accessed: float = 0.0
    collective_bytes: float = 0.0
    kernels: float = 0.0
    compute_s: float = 0.0
    memory_s: float = 0.0
    work_s: float = 0.0
    collective_s: float = 0.0
    compile_s: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether one device's memory holds it."""
        return self.activations is not None and self.peak <= self.hbm

    @property
    def missing(self) -> int:
        """Bytes by which it does not fit."""
        return max(0, self.peak - self.hbm)

    @property
    def seconds(self) -> float:
        """Of one run, collectives hidden behind the work; without that, `work_s + collective_s`."""
        return max(self.work_s, self.collective_s)

    @property
    def bound(self) -> str:
        """What takes longest: the links, or the work, and of that FLOPs or bytes."""
        if self.collective_s > self.work_s:
            return "interconnect"
        return "compute" if self.compute_s > self.memory_s else "memory"


def compile_report(
    program: str, lowered: Lowered, topology: Topology, *, quick: bool = False
) -> tuple[Report, Account | None]:
    """Compile for devices that are not there; minutes for SDXL.

    Args:
        program: its name.
        lowered: from `megjax.plan.programs`.
        topology: of the devices that it was lowered for.
        quick: seconds instead; operations are fused less, so that bytes, temporaries and times are higher.

    Returns:
        The report, and the compiled program's account: None if it does not fit.
    """
    chip, start = topology.chip, time.perf_counter()
    common: dict[str, Any] = {
        "program": program,
        "topology": topology.name,
        "devices": len(topology.devices),
        "images": lowered.images,
        "parts": lowered.parts,
        "hbm": chip.hbm_bytes,
    }
    try:
        options: dict[str, Any] = {**TPU_OPTIONS, **(QUICK if quick else {})}
        compiled = lowered.lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        used = _used_bytes(str(error), sum(lowered.parts.values()))
        if used is None:
            raise
        seconds = time.perf_counter() - start
        return Report(**common, activations=None, peak=used, compile_s=seconds), None
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    did = account(text, chip, dynamic_trips=lowered.trips)
    report = Report(
        **common,
        activations=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=did.flops,
        bytes_accessed=did.bytes_accessed,
        collective_bytes=did.collective_bytes,
        kernels=did.kernels,
        compute_s=did.flops / chip.flops_per_s,
        memory_s=did.bytes_accessed / chip.bytes_per_s,
        work_s=did.seconds,
        collective_s=did.collective_s,
        compile_s=seconds,
    )
    return report, did


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_ALL = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM")


def _used_bytes(message: str, arguments: int) -> int | None:
    """What the compiler says that a program needs which does not fit; None for any other error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, known in ((_ALL, 0), (_TEMPORARIES, arguments)):
        if match := pattern.search(message):
            return int(float(match[1]) * _UNITS[match[2]]) + known
    return None


def largest_images(report: Report, other: Report | None = None) -> int:
    """Pictures a device that fit.

    Without another compilation, an estimate on the safe side: all that the program needs besides its
    arguments grows with the pictures. With one at another number of pictures, the line through both.

    Args:
        report: one that fits.
        other: the same program at another number of pictures.
    """
    assert report.activations is not None
    if other is None or other.activations is None or other.images == report.images:
        # A small program's activations may never reach the memory, but its pictures do.
        needed = max(report.activations, report.peak - sum(report.parts.values()))
        each = needed / report.images
    else:
        each = (other.peak - report.peak) / (other.images - report.images)
    return report.images + int(max(0, report.hbm - report.peak) / max(each, 1))


def advice(
    report: Report, chip: Chip, *, remat: bool, fsdp: int, accumulate: int, largest: int | None
) -> str:
    """What to change: how to make it fit, or how to make better use of what is there.

    Args:
        report: of the training step, sampling or decoding.
        chip: that it is for.
        remat: whether activations are recomputed.
        fsdp: parts that the states are cut into.
        accumulate: parts of a batch.
        largest: pictures a device that fit; None if none does.
    """
    if report.program != "train":
        if report.fits:
            return f"each device has its own pictures: up to {largest} at a time"
        return "fewer pictures at a time, or a chip with more memory"
    states = sum(report.parts.values())
    if not report.fits:
        changes = []
        if not remat:
            changes.append("--remat")
        if fsdp < report.devices:
            changes.append(f"--fsdp {report.devices} (states are {states / GIB:.2f} GiB a device)")
        if report.images > accumulate:
            changes.append(f"--accumulate {int(report.images)} (one picture a device at a time)")
        rest = max(report.peak - states, 0)
        fitting = smallest(chip, states * fsdp, rest)
        if fitting:
            changes.append(f"--topology {fitting}")
        return "; or ".join(changes or ["--lora-rank 64", "another chip"])
    assert largest is not None
    hints = []
    if report.bound == "interconnect":
        hints.append("the links are the bound: more pictures a device hide them")
    if largest > report.images:
        hints.append(f"up to {largest} pictures a device")
    if remat and report.peak < report.hbm / 2:
        hints.append("there may be room for --no-remat, which saves a third of the student's work")
    if not hints:
        hints.append("nothing: it fits and is used well")
    return "; ".join(hints)


def smallest(chip: Chip, states: int, rest: int) -> str | None:
    """The smallest usual topology where a device holds its part of the states and `rest`; an estimate."""
    for name in sizes_of(chip):
        if states / math.prod(parse(name)[1]) + rest <= chip.hbm_bytes:
            return name
    return None
