"""TPU chips as data, and their topologies as libtpu describes them, with no TPU present."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from megjax.errors import MegError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a topology.

    Args:
        name: as topologies are called, `v5e`.
        hbm_bytes: of memory that a program may use.
        flops_per_s: matrix products in bfloat16, as the compiler reckons.
        bytes_per_s: of the memory, as the compiler reckons.
        ici_bytes_per_s: out of one chip to its neighbours, all links together (published figures).
        dimensions: of its topologies.
    """

    name: str
    hbm_bytes: int
    flops_per_s: float
    bytes_per_s: float
    ici_bytes_per_s: float
    dimensions: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 197e12, 737.66e9, 200e9, 2),
        Chip("v5p", int(95.74 * GIB), 394e12, 2350.4e9, 600e9, 3),
        Chip("v6e", int(31.25 * GIB), 918e12, 1638.0e9, 448e9, 2),
    )
}
"""The compiler's rates are those of its own estimates (`optimal_seconds`), held by a test."""

TPU_OPTIONS = {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
    "xla_tpu_scoped_vmem_limit_kib": 8192,
    "xla_vf_vmem_max_repacks": 0,
    "xla_vf_vmem_max_retries": 0,
}
"""Of libtpu's compiler. Without space-to-batch a picture's convolutions at small batches are not spread over
a batch that they do not have, to and fro; half its scratch memory halves the compiler's search for tiles;
laying out the fast memory once, not again and again, halves the rest."""

QUICK = {"exec_time_optimization_effort": -1.0}
"""Besides: the compiler's least effort."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are wired together.

    Args:
        name: `v5e:4x4`.
        chip: of which kind.
        devices: to compile for; none of them exists.
    """

    name: str
    chip: Chip
    devices: list[Any] = dataclasses.field(repr=False)


def sizes_of(chip: Chip, largest: int = 256) -> list[str]:
    """Names of the usual topologies, smallest first."""
    if chip.dimensions == 2:
        shapes = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
    else:
        shapes = ["1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"]
    return [f"{chip.name}:{s}" for s in shapes if math.prod(map(int, s.split("x"))) <= largest]


def topology(name: str) -> Topology:
    """Describe a topology such as `v5e:4x4` or `v5p:2x2x1`.

    Raises:
        MegError: for a name that is none, for one that the installed libtpu lacks, and without libtpu.
    """
    chip, shape = parse(name)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise MegError("planning for a TPU takes its compiler: pip install 'megjax[tpu]'")
    # Nothing but the compiler is wanted: neither a look for chips nor the lock on them.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options = {}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise MegError(f"topology {name!r}: the installed libtpu does not have it ({reason[:200]})") from None
    return Topology(name, chip, list(devices))


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape in a topology's name; raises `MegError` for what is none."""
    # Four digits are more than any topology has, and few enough to be a number.
    match = re.fullmatch(r"(\w+):(\d{1,4}(?:x\d{1,4})*)", name)
    if not match or match[1] not in CHIPS:
        shown = name if len(name) <= 80 else name[:80] + "..."
        raise MegError(
            f"topology {shown!r}: give a chip ({', '.join(CHIPS)}) and its shape, such as v5e:4x4 or "
            "v5p:2x2x1"
        )
    chip, shape = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    if len(shape) != chip.dimensions or 0 in shape:
        raise MegError(
            f"topology {name!r}: {chip.name} has {chip.dimensions} dimensions, such as {sizes_of(chip)[3]}"
        )
    return chip, shape
