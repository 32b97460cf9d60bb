"""Hardware profiles as data: what a FLOP costs at either end, and what a frame's computation then costs.

A profile is FLOP-linear (seconds and joules per FLOP at the server and at the device) or, for `table2`,
calibrated in seconds per denoising step. `eval.profile` measures one for this machine and saves it as JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from megjax.errors import MegError
from megjax.files import write_file
from megjax.link.cost import SDXL, Compute, Workload

DEVICES = ("phone_flagship", "phone_midrange", "paper_device")
"""What a server's profile is completed with."""


@dataclass(frozen=True)
class Machine:
    """One end of the link."""

    flops_per_s: float
    """f_ES or f_UE, sustained."""
    j_per_flop: float
    """zeta."""
    access_s: float = 0.0
    """t0."""
    source: str = ""
    """Where the numbers are from: measured, data sheet, assumed."""

    def __post_init__(self) -> None:
        if not 0 < self.flops_per_s < math.inf:
            raise MegError(f"flops_per_s {self.flops_per_s}: must be a number above 0")
        _check_not_negative(self, "j_per_flop", "access_s")


@dataclass(frozen=True)
class Profile:
    """A FLOP-linear profile, Eqs. (1)-(3)."""

    name: str
    server: Machine
    device: Machine
    fixed_j: float = 0.0
    """e0."""

    def __post_init__(self) -> None:
        _check_not_negative(self, "fixed_j")


@dataclass(frozen=True)
class StepProfile:
    """Computation timed by the step: Table II's column, whose two cases no FLOP-linear profile fits."""

    name: str
    fixed_s: float
    """Everything but the steps, decoding included (at the server's speed)."""
    step_s: float
    """One step without token merging."""
    tome_step_s: float
    """One step with it."""
    power_w: float
    source: str = ""

    def __post_init__(self) -> None:
        _check_not_negative(self, "fixed_s", "step_s", "tome_step_s", "power_w")


def _check_not_negative(record: object, *names: str) -> None:
    for name in names:
        if not 0 <= (value := getattr(record, name)) < math.inf:
            raise MegError(f"{name} {value}: must be a number from 0 on")


AnyProfile: TypeAlias = Profile | StepProfile


def names() -> tuple[str, ...]:
    """Return the names of the profiles that `load` knows."""
    ends = ("paper_server", *DEVICES)
    return ("paper", "table2", *(name for name in _data()["machines"] if name not in ends))


def load(name: str | Path, device: str = "phone_flagship") -> AnyProfile:
    """Return a profile by name, or from a JSON file that `save` wrote.

    Args:
        name: `paper`, `table2`, a server (`a40`, `a100`, `h100`, `h200`, `tpu_v5e`) or a path ending in
            .json.
        device: the machine at the other end (`phone_flagship`, `phone_midrange`, `paper_device`), for
            servers.

    Raises:
        MegError: an unknown name, or a file that is no profile.
    """
    if str(name).endswith(".json"):
        return _read(Path(name))
    data = _data()
    if name == "table2":
        return StepProfile(name="table2", **data["table2"])
    machines = {key: Machine(**value) for key, value in data["machines"].items()}
    if device not in machines:
        raise MegError(f"unknown device {device!r}: one of {', '.join(DEVICES)}")
    if name == "paper":
        return Profile("paper", machines["paper_server"], machines["paper_device"])
    if name not in names():
        raise MegError(
            f"unknown hardware profile {str(name)!r}: one of {', '.join(names())}, or a .json file"
        )
    return Profile(str(name), machines[str(name)], machines[device])


def save(path: Path, profile: AnyProfile) -> None:
    """Write a profile as JSON, atomically."""
    write_file(path, json.dumps(asdict(profile), indent=2))


def compute(
    profile: AnyProfile, workload: Workload = SDXL, *, image_to_image: bool = False, tome: bool = True
) -> Compute:
    """Return the computation's latency and energy as functions of the steps, Eqs. (1)-(3).

    Args:
        profile: the hardware.
        workload: FLOPs of one frame, read by FLOP-linear profiles. Of step-timed ones a step lasts as long as
            its U-Net calls, timed with both branches of guidance.
        image_to_image: charge the VAE encoder too; step-timed profiles have no time for it.
        tome: whether the U-Net merges tokens; read by step-timed profiles (FLOPs say so themselves).
    """
    if isinstance(profile, StepProfile):
        step_s = (profile.tome_step_s if tome else profile.step_s) * workload.calls_per_step / 2
        return Compute(
            es_fixed_s=profile.fixed_s,
            es_step_s=step_s,
            ue_s=0.0,
            es_fixed_j=profile.fixed_s * profile.power_w,
            es_step_j=step_s * profile.power_w,
            ue_j=0.0,
        )
    server, device = profile.server, profile.device
    encoder = workload.text_encoder_flops + (workload.vae_encoder_flops if image_to_image else 0.0)
    step = workload.calls_per_step * workload.unet_call_flops
    return Compute(
        es_fixed_s=encoder / server.flops_per_s + server.access_s,
        es_step_s=step / server.flops_per_s,
        ue_s=workload.vae_decoder_flops / device.flops_per_s + device.access_s,
        es_fixed_j=encoder * server.j_per_flop,
        es_step_j=step * server.j_per_flop,
        ue_j=workload.vae_decoder_flops * device.j_per_flop,
        fixed_j=profile.fixed_j,
    )


def _data() -> dict[str, Any]:
    return json.loads(resources.files("megjax.link").joinpath("hardware.json").read_text())


def _read(path: Path) -> AnyProfile:
    try:
        fields = json.loads(path.read_text())
        if "step_s" in fields:
            return StepProfile(**fields)
        server, device = (Machine(**fields.pop(end)) for end in ("server", "device"))
        return Profile(server=server, device=device, **fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MegError(f"{path} is not a hardware profile: {error}") from error
