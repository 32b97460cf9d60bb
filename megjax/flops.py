"""FLOPs and bytes of JAX programs: XLA's cost analysis, with every loop's body counted as often as it runs.

XLA counts a loop's body once, however often it runs, so that a network of scanned blocks looks many times
too cheap. Here a program costs what XLA says of it and, for each of its loops, what XLA says of the body as a
program of its own, times the trips that are missing.
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
    module = _Module(text)
    return Cost(*map(float, _cost(module, _Frame(module.computations[module.entry]), dynamic_trips)))


def _cost(module: _Module, frame: _Frame, dynamic_trips: int | None) -> np.ndarray:
    return module.cost_once(frame.computation.name) + _missing(module, frame, dynamic_trips)


def _missing(module: _Module, frame: _Frame, dynamic_trips: int | None) -> np.ndarray:
    """What XLA's cost of a computation leaves out: further trips of the loops in it and in what it calls."""
    total = np.zeros(len(Cost._fields))
    for instruction in frame.computation.instructions.values():
        inner = [_Frame(module.computations[name], frame, instruction) for name in instruction.callees]
        match instruction.opcode:
            case "while":
                condition, body = inner
                trips = _trips(module, condition, body)
                trips = dynamic_trips if trips is None else trips
                if trips is None:
                    raise MegError(
                        f"loop {instruction.name}: the program does not tell how often it runs; "
                        "give the trips to count as dynamic_trips"
                    )
                total += trips * _cost(module, body, dynamic_trips) - module.cost_once(body.computation.name)
            case "conditional":
                # XLA counts the dearest branch.
                once = np.max([module.cost_once(branch.computation.name) for branch in inner], axis=0)
                total += np.max([_cost(module, branch, dynamic_trips) for branch in inner], axis=0) - once
            case "call" | "fusion" | "async-start":
                total += _missing(module, inner[0], dynamic_trips)
    return total


# How often a loop runs.


class _Frame(NamedTuple):
    """A computation and the instruction that runs it."""

    computation: _Computation
    caller: _Frame | None = None
    instruction: _Instruction | None = None


class _Value(NamedTuple):
    """An instruction's result, or the element of it at `path`."""

    frame: _Frame
    instruction: _Instruction
    path: tuple[int, ...]


def _trips(module: _Module, condition: _Frame, body: _Frame) -> int | None:
    """Trips of a loop that counts up to a constant in constant steps, as `lax.scan`'s do; else None."""
    loop, outside = body.instruction, body.caller
    assert loop is not None
    assert outside is not None
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    follow = functools.partial(_follow, module)
    test = follow(condition, condition.computation.root)
    if test.instruction.opcode != "compare" or "direction=LT" not in test.instruction.attributes:
        return None
    counter, bound = (follow(test.frame, operand) for operand in test.instruction.operands)
    following = follow(body, body.computation.root, counter.path)
    if not _is_parameter(counter) or following.instruction.opcode != "add":
        return None
    current, step = (follow(following.frame, operand) for operand in following.instruction.operands)
    if _is_parameter(step):
        current, step = step, current
    if not _is_parameter(current) or current.path != counter.path:
        return None
    match [_integer(value) for value in (follow(outside, loop.operands[0], counter.path), bound, step)]:
        case int(start), int(stop), int(by) if by > 0:
            return max(0, -((start - stop) // by))
    return None


def _is_parameter(value: _Value) -> bool:
    return value.instruction.opcode == "parameter"


def _integer(value: _Value) -> int | None:
    if value.instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", value.instruction.operands[0]):
        return None
    return int(value.instruction.operands[0])


def _follow(module: _Module, frame: _Frame, name: str, path: tuple[int, ...] = ()) -> _Value:
    """Trace a value to where it is made: through copies, tuples, calls, and loops that carry it unchanged."""
    follow = functools.partial(_follow, module)
    instruction = frame.computation.instructions[name]
    match instruction.opcode:
        case "copy" | "copy-start" | "copy-done" | "bitcast" | "convert" | "reshape" | "opt-barrier":
            return follow(frame, instruction.operands[0], path)
        case "get-tuple-element":
            index = re.findall(r"\bindex=(\d+)", instruction.attributes)[0]
            return follow(frame, instruction.operands[0], (int(index), *path))
        case "tuple" if path:
            return follow(frame, instruction.operands[path[0]], path[1:])
        case "call" | "fusion":
            callee = module.computations[instruction.callees[0]]
            return follow(_Frame(callee, frame, instruction), callee.root, path)
        case "parameter" if frame.caller and frame.instruction:
            run_by = frame.instruction
            if run_by.opcode in ("call", "fusion"):
                return follow(frame.caller, run_by.operands[int(instruction.operands[0])], path)
            if run_by.opcode == "while" and _is_carried_unchanged(module, run_by, path):
                return follow(frame.caller, run_by.operands[0], path)
    return _Value(frame, instruction, path)


def _is_carried_unchanged(module: _Module, loop: _Instruction, path: tuple[int, ...]) -> bool:
    body = module.computations[loop.callees[1]]
    # Without its caller, so that the search ends at the body's own parameter.
    result = _follow(module, _Frame(body), body.root, path)
    return _is_parameter(result) and result.path == path


# Reading HLO.


class _Instruction(NamedTuple):
    name: str
    opcode: str
    operands: list[str]
    callees: list[str]
    attributes: str


class _Computation(NamedTuple):
    name: str
    instructions: dict[str, _Instruction]
    root: str
    text: str


_HEADER = re.compile(r"(ENTRY )?(\S+) \{")
_INSTRUCTION = re.compile(r"  (ROOT )?(\S+) = .*? ([a-z][\w\-]*)\((.*?)\)(.*)")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|condition|body|true_computation|false_computation|branch_computations|called_computations"
    r"|select|scatter)=(?:\{([^}]*)\}|([^\s,]+))"
)


class _Module:
    """A program's computations, and XLA's cost of each."""

    def __init__(self, text: str):
        options = hlo.HloPrintOptions.short_parsable()
        options.print_large_constants = False
        lines = hlo.hlo_module_from_text(text).to_string(options).splitlines()
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        headers = [i for i, line in enumerate(lines) if _HEADER.fullmatch(line)]
        for start, stop in zip(headers, [*headers[1:], len(lines)], strict=True):
            is_entry, name = _HEADER.findall(lines[start])[0]
            self.computations[name] = _computation(name, lines[start + 1 : stop])
            self.entry = name if is_entry else self.entry
        self.cost_once = functools.cache(self._cost_once)

    def _cost_once(self, name: str) -> np.ndarray:
        """XLA's cost of a computation, with the body of each loop counted once."""
        needed, found = set(), [name]
        while found:
            needed.add(current := found.pop())
            found += [c for i in self.computations[current].instructions.values() for c in i.callees]
        # As the parser wants them: callees before callers, which is how they are printed.
        callees = [c.text for c in self.computations.values() if c.name in needed - {name}]
        text = "\n".join(["HloModule part\n", *callees, "ENTRY " + self.computations[name].text])
        properties = _jax.hlo_module_cost_analysis(_client(), hlo.hlo_module_from_text(text))
        return np.array([properties.get(field.replace("_", " "), 0.0) for field in Cost._fields])


def _computation(name: str, lines: list[str]) -> _Computation:
    instructions, root = {}, ""
    for line in lines:
        if match := _INSTRUCTION.match(line):
            is_root, instruction, opcode, operands, attributes = match.groups()
            callees = [c for found in _CALLEES.findall(attributes) for c in "".join(found).split(", ")]
            instructions[instruction] = _Instruction(
                instruction, opcode, operands.split(", "), callees, attributes
            )
            root = instruction if is_root else root
    return _Computation(name, instructions, root, "\n".join([f"{name} {{", *lines]))


def _client() -> Any:
    # Any will do, since the analysis is XLA's general one. The CPU's can be absent (JAX_PLATFORMS=cuda).
    try:
        return jax.local_devices(backend="cpu")[0].client
    except RuntimeError:
        return jax.local_devices()[0].client
