"""FLOPs and bytes of JAX programs: XLA's cost analysis, with every loop's body counted as often as it runs.

XLA counts a loop's body once, however often it runs, so that a network of scanned blocks looks many times
too cheap. Here a program costs what XLA says of it and, for each of its loops, what XLA says of the body as a
program of its own, times the trips that are missing. `operations` tells the same, operation by operation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

# What `Lowered.cost_analysis` calls, which takes whole programs only; here it is asked about loop bodies.
from jax._src.lib import _jax, hlo  # pyright: ignore[reportAttributeAccessIssue]

from megjax.errors import MegError
from megjax.hlo import Frame, Instruction, Module, trips_of


class Cost(NamedTuple):
    """What one run of a program costs.

    Args:
        flops: floating-point operations; a multiply-add is two. Kernels (cuDNN, Pallas) count as none.
        bytes_accessed: bytes that the operations read and write, without what stays inside a fusion.
        transcendentals: exponentials, roots and the like, which are not among the flops.
    """

    flops: float
    bytes_accessed: float
    transcendentals: float


class Operation(NamedTuple):
    """An operation of a compiled program.

    Args:
        instruction: what it is.
        runs: how often it runs.
        in_loop: whether a loop runs it.
        cost: of one run.
    """

    instruction: Instruction
    runs: float
    in_loop: bool
    cost: Cost


def count(fn: Callable[..., Any], *args: Any, dynamic_trips: int | None = None, **kwargs: Any) -> Cost:
    """Cost of `fn(*args, **kwargs)`, which is lowered for the CPU but neither compiled nor run.

    Nothing is optimised yet: the FLOPs are the model's, the bytes those of a program without any fusion.
    For the bytes of a compiled program see `count_hlo`.

    Args:
        fn: a function, jitted or not.
        args: its arguments; `jax.ShapeDtypeStruct`s will do, so no weights need exist.
        dynamic_trips: trips assumed of each loop of which the program does not tell how often it runs.
        kwargs: its keyword arguments, likewise.

    Raises:
        MegError: there is such a loop and `dynamic_trips` is not given.
    """
    jitted = fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn)
    lowered = jitted.trace(*args, **kwargs).lower(lowering_platforms=("cpu",))
    return count_hlo(lowered.as_text("hlo"), dynamic_trips=dynamic_trips)


def count_hlo(text: str, *, dynamic_trips: int | None = None) -> Cost:
    """Cost of a program in HLO: `compiled.as_text()`, for whatever hardware, or `lowered.as_text("hlo")`.

    Args:
        text: the program; of a sharded one, the cost is one device's.
        dynamic_trips: trips assumed of each loop of which the program does not tell how often it runs.

    Raises:
        MegError: there is such a loop and `dynamic_trips` is not given.
    """
    module = Module(text)
    once = functools.cache(lambda name: _analysed(module.program(name)))

    def cost(frame: Frame) -> np.ndarray:
        return once(frame.computation.name) + missing(frame)

    def missing(frame: Frame) -> np.ndarray:
        """What XLA's cost of a computation leaves out: further trips of the loops in it and its callees."""
        total = np.zeros(len(Cost._fields))
        for instruction in frame.computation.instructions.values():
            inner = module.frames(frame, instruction)
            match instruction.opcode:
                case "while":
                    condition, body = inner
                    runs = _runs(module, condition, body, dynamic_trips)
                    total += runs * cost(body) - once(body.computation.name)
                case "conditional":
                    # XLA counts the dearest branch.
                    dearest = np.max([once(branch.computation.name) for branch in inner], axis=0)
                    total += np.max([cost(branch) for branch in inner], axis=0) - dearest
                case "call" | "fusion" | "async-start":
                    total += missing(inner[0])
        return total

    return Cost(*map(float, cost(Frame(module.computations[module.entry]))))


# Opcodes that move and compute nothing of their own.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id"),
}


def operations(module: Module, *, dynamic_trips: int | None = None) -> list[Operation]:
    """The operations of a compiled program, fusions as one, each with XLA's cost and how often it runs.

    Of a conditional's branches the one with most FLOPs, then bytes, is taken.

    Args:
        module: the program, `Module(compiled.as_text())`.
        dynamic_trips: trips assumed of each loop of which the program does not tell how often it runs.

    Raises:
        MegError: there is such a loop and `dynamic_trips` is not given.
    """

    def of(frame: Frame, runs: float, in_loop: bool) -> list[Operation]:
        found = []
        for instruction in frame.computation.instructions.values():
            inner = module.frames(frame, instruction)
            match instruction.opcode:
                case "while":
                    condition, body = inner
                    found += of(body, runs * _runs(module, condition, body, dynamic_trips), True)
                case "conditional":
                    found += max((of(branch, runs, in_loop) for branch in inner), key=_weight)
                case "call":
                    found += of(inner[0], runs, in_loop)
                case opcode if opcode not in _FREE:
                    found.append(Operation(instruction, runs, in_loop, _cost_of(module, frame, instruction)))
        return found

    return of(Frame(module.computations[module.entry]), 1.0, False)


def _weight(found: list[Operation]) -> tuple[float, float]:
    return (
        sum(op.runs * op.cost.flops for op in found),
        sum(op.runs * op.cost.bytes_accessed for op in found),
    )


def _runs(module: Module, condition: Frame, body: Frame, dynamic_trips: int | None) -> int:
    trips = trips_of(module, condition, body)
    trips = dynamic_trips if trips is None else trips
    if trips is None:
        assert body.instruction is not None
        raise MegError(
            f"loop {body.instruction.name}: the program does not tell how often it runs; "
            "give the trips to count as dynamic_trips"
        )
    return trips


def _cost_of(module: Module, frame: Frame, instruction: Instruction) -> Cost:
    """XLA's cost of one instruction; unknown (a kernel's) counts as none."""
    started = _started(frame, instruction)
    values = _analysed(_alone(module, frame, [*started, instruction]))
    if started:
        # The parser takes the end of an asynchronous operation only together with its start.
        values = values - _analysed(_alone(module, frame, started))
    return Cost(*(max(0.0, float(value)) for value in values))


def _started(frame: Frame, instruction: Instruction) -> list[Instruction]:
    """The asynchronous operation that an instruction goes on with, from its start."""
    if not instruction.opcode.endswith(("-done", "-update")):
        return []
    start = frame.computation.instructions[instruction.operands[0]]
    return [*_started(frame, start), start]


def _alone(module: Module, frame: Frame, chain: list[Instruction]) -> str:
    """A program of these instructions, whose other operands are parameters."""
    own = {instruction.name for instruction in chain}
    names = dict.fromkeys(n for i in chain for n in i.operands if n and n not in own)
    shapes = [frame.computation.instructions[name].shape for name in names]
    lines = ["HloModule part\n"]
    lines += [c.text for c in module.called([name for i in chain for name in i.callees])]
    lines.append("ENTRY alone {")
    lines += [
        f"  {n} = {shape} parameter({k})" for k, (n, shape) in enumerate(zip(names, shapes, strict=True))
    ]
    for i in chain:
        root = "ROOT " if i is chain[-1] else ""
        attributes = _CONTROL.sub("", i.attributes)
        lines.append(f"  {root}{i.name} = {i.shape} {i.opcode}({', '.join(i.operands)}){attributes}")
    return "\n".join([*lines, "}"])


# Attributes that name other instructions.
_CONTROL = re.compile(r", control-predecessors=\{[^}]*\}")


def _analysed(text: str) -> np.ndarray:
    properties = _jax.hlo_module_cost_analysis(_client(), hlo.hlo_module_from_text(text))
    return np.array([properties.get(field.replace("_", " "), 0.0) for field in Cost._fields])


def _client() -> Any:
    # Any will do, since the analysis is XLA's general one. The CPU's can be absent (JAX_PLATFORMS=cuda).
    try:
        return jax.local_devices(backend="cpu")[0].client
    except RuntimeError:
        return jax.local_devices()[0].client
