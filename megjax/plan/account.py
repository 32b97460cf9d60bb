"""What a compiled program does on one device, loops counted as often as they run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from megjax import flops
from megjax.flops import Operation
from megjax.hlo import Instruction
from megjax.plan.chips import Chip

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1} | {
    f"{sign}{bits}": max(1, bits // 8) for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective operation.

    Args:
        opcode: `all-gather`, without its `-start`.
        output_bytes: of one run's result on one device.
        sent_bytes: what a device sends in one run, by ring algorithms.
        runs: how often it runs.
        in_loop: whether a loop runs it.
        where: the line of JAX that it comes from, if the compiler kept it.
    """

    opcode: str
    output_bytes: int
    sent_bytes: float
    runs: float
    in_loop: bool
    where: str


class Account(NamedTuple):
    """One run of a program on one device.

    Args:
        flops: a multiply-add is two; kernels count as none.
        bytes_accessed: read and written by operations, in whichever memory.
        seconds: each operation at the chip's rate for its FLOPs or its bytes, whichever takes longer, one
            after the other: what XLA calls `optimal_seconds`. Without collectives.
        collective_s: collectives at the chip's rate to its neighbours, one after the other.
        kernels: runs of kernels, which have no estimate.
        collectives: the collective operations.
    """

    flops: float
    bytes_accessed: float
    seconds: float
    collective_s: float
    kernels: float
    collectives: list[Collective]

    @property
    def collective_bytes(self) -> float:
        """Bytes that a device sends."""
        return math.fsum(c.runs * c.sent_bytes for c in self.collectives)


def account(text: str, chip: Chip, *, dynamic_trips: int | None = None) -> Account:
    """Account for a compiled program.

    Args:
        text: `compiled.as_text()`.
        chip: that it was compiled for.
        dynamic_trips: trips assumed of each loop of which the program does not tell how often it runs.

    Raises:
        MegError: there is such a loop and `dynamic_trips` is not given.
    """
    module = flops.Module(text)
    operations = flops.operations(module, dynamic_trips=dynamic_trips)
    found: list[Collective] = []
    seconds = 0.0
    for operation in operations:
        inside = list(_collectives(module, operation))
        found += inside
        if not inside:
            seconds += operation.runs * operation_s(operation, chip)
    return Account(
        flops=math.fsum(o.runs * o.cost.flops for o in operations),
        bytes_accessed=math.fsum(o.runs * o.cost.bytes_accessed for o in operations),
        seconds=seconds,
        collective_s=math.fsum(c.runs * c.sent_bytes for c in found) / chip.ici_bytes_per_s,
        kernels=math.fsum(o.runs for o in operations if _is_kernel(o.instruction)),
        collectives=found,
    )


def operation_s(operation: Operation, chip: Chip) -> float:
    """Seconds of one run: by its FLOPs or its bytes, whichever take longer."""
    cost = operation.cost
    return max(cost.flops / chip.flops_per_s, cost.bytes_accessed / chip.bytes_per_s)


def shape_bytes(shape: str) -> list[int]:
    """Bytes of each array in an HLO shape, `bf16[8,128]{1,0}` or a tuple of such, without padding."""
    sizes = []
    for kind, dims in _ARRAY.findall(shape):
        size = _ITEM_BYTES.get(kind, 4)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        sizes.append(size)
    return sizes


def _is_kernel(instruction: Instruction) -> bool:
    # Two ways to name memory are none.
    named = ("ConcatBitcast", "AllocateBuffer")
    return instruction.opcode == "custom-call" and not any(n in instruction.attributes for n in named)


def _collectives(module: flops.Module, operation: Operation) -> Iterator[Collective]:
    """The collectives that an operation is, or has fused inside."""
    instruction = operation.instruction
    inside = [i for c in module.called(instruction.callees) for i in c.instructions.values()]
    for each in [instruction, *inside]:
        name = each.opcode.removesuffix("-start")
        if name not in COLLECTIVES:
            continue
        arrays = shape_bytes(each.shape)
        # A start's result holds its operands too, and the largest array is what is gathered or reduced.
        output = max(arrays) if each.opcode.endswith("-start") or name == "all-gather" else sum(arrays)
        group = _group_size(each.attributes)
        yield Collective(
            name,
            output,
            _sent(name, output, group),
            operation.runs,
            operation.in_loop,
            _where(each, instruction),
        )


def _sent(name: str, output: float, group: int) -> float:
    """Bytes a device sends round a ring of `group` devices."""
    share = (group - 1) / group
    return {
        "all-gather": output * share,
        "all-reduce": 2 * output * share,
        "reduce-scatter": output * (group - 1),
        "all-to-all": output * share,
        "collective-permute": output,
    }[name]


def _group_size(attributes: str) -> int:
    """Devices in a collective's group, in any of the three ways in which XLA prints them."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    return 2


def _where(*instructions: Instruction) -> str:
    for instruction in instructions:
        if match := re.search(r'op_name="([^"]*)"', instruction.attributes):
            return match[1]
    return ""
