"""What `megjax plan` is asked, apart from the compilers that answer it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compile a backbone's programs for a TPU topology, none of it present, and tell what one device needs.

    Memory, FLOPs and bytes are those of the compiled programs, loops counted as often as they run; times are
    a roofline at the compiler's own rates. SDXL's training step takes a quarter of an hour of one core and
    more, with `--quick` minutes. Exit code 3: it does not fit.
    """

    backbone: tyro.conf.Positional[Literal["sdxl", "tiny"]]
    """`sdxl` at 1024 x 1024, or `tiny`."""
    topology: str
    """Such as `v5e:4x4`, `v5p:2x2x1` or `v6e:2x4`."""
    program: Literal["all", "train", "sample", "decode"] = "all"
    """Which to compile."""
    images: int = 1
    """Pictures a device; the trainers' `--batch` is over all devices."""
    accumulate: int = 1
    """Parts of a training batch, one after the other."""
    replicas: int = 1
    """Copies of the training states."""
    fsdp: int = -1
    """Parts that the training states are cut into; -1 takes the devices that are left."""
    tensor: int = 1
    """Devices that attention's heads are cut over."""
    remat: bool = True
    """Recompute the student's activations in the backward pass."""
    lora_rank: int = 0
    """Train low-rank factors."""
    solver_steps: int = 10
    """Of the teacher in a window."""
    steps: int = 8
    """Denoising steps counted for sampling; its executable serves any number."""
    largest: bool = False
    """Compile again with twice the pictures: the largest batch is then no estimate from one compilation."""
    quick: bool = False
    """Compile with the compiler's least effort: seconds for minutes, and figures on the safe side."""
    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"
    """See the trainer."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Of the optimiser's first moment."""
    offload_ema: bool = False
    """Keep the moving average in the hosts' memory."""
    json: Path | None = None
    """Where to save the figures."""
