"""Programs in HLO, XLA's language, as text: what runs in them, and how often each loop does."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

# The parser and printer of programs, which JAX does not export.
from jax._src.lib import hlo  # pyright: ignore[reportAttributeAccessIssue]


class Instruction(NamedTuple):
    """One operation.

    Args:
        name: unique in its computation.
        shape: of the result, with its layout.
        opcode: such as `fusion`.
        operands: names; of a parameter its number, of a constant its value.
        callees: computations that it runs.
        attributes: the rest of the line.
    """

    name: str
    shape: str
    opcode: str
    operands: list[str]
    callees: list[str]
    attributes: str


class Computation(NamedTuple):
    """A program, a loop's body, the inside of a fusion, and so on.

    Args:
        name: unique in the module.
        instructions: by name, in order of execution if compiled.
        root: name of the result.
        text: as printed.
    """

    name: str
    instructions: dict[str, Instruction]
    root: str
    text: str


class Frame(NamedTuple):
    """A computation and the instruction that runs it."""

    computation: Computation
    caller: Frame | None = None
    instruction: Instruction | None = None


_HEADER = re.compile(r"(ENTRY )?(\S+) \{")
_INSTRUCTION = re.compile(r"  (ROOT )?(\S+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(.*)")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|condition|body|true_computation|false_computation|branch_computations|called_computations"
    r"|select|scatter)=(?:\{([^}]*)\}|([^\s,]+))"
)


class Module:
    """A program's computations, by name, and which is its entry."""

    def __init__(self, text: str):
        options = hlo.HloPrintOptions.short_parsable()
        options.print_large_constants = False
        lines = hlo.hlo_module_from_text(text).to_string(options).splitlines()
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        headers = [i for i, line in enumerate(lines) if _HEADER.fullmatch(line)]
        for start, stop in zip(headers, [*headers[1:], len(lines)], strict=True):
            is_entry, name = _HEADER.findall(lines[start])[0]
            self.computations[name] = _computation(name, lines[start + 1 : stop])
            self.entry = name if is_entry else self.entry

    def frames(self, frame: Frame, instruction: Instruction) -> list[Frame]:
        """What an instruction of `frame` runs."""
        return [Frame(self.computations[name], frame, instruction) for name in instruction.callees]

    def called(self, names: list[str]) -> list[Computation]:
        """The computations `names` and all that they run, callees before callers."""
        needed, found = set(), list(names)
        while found:
            current = found.pop()
            if current not in needed:
                needed.add(current)
                found += [c for i in self.computations[current].instructions.values() for c in i.callees]
        # Which is how they are printed.
        return [c for c in self.computations.values() if c.name in needed]

    def program(self, name: str) -> str:
        """The text of a program that runs the computation `name`."""
        *callees, entry = (c.text for c in self.called([name]))
        return "\n".join(["HloModule part\n", *callees, "ENTRY " + entry])


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, ""
    for line in lines:
        if match := _INSTRUCTION.match(line):
            is_root, instruction, shape, opcode, operands, attributes = match.groups()
            callees = [c for found in _CALLEES.findall(attributes) for c in "".join(found).split(", ")]
            instructions[instruction] = Instruction(
                instruction, shape, opcode, operands.split(", "), callees, attributes
            )
            root = instruction if is_root else root
    return Computation(name, instructions, root, "\n".join([f"{name} {{", *lines]))


# How often a loop runs.


class _Value(NamedTuple):
    """An instruction's result, or the element of it at `path`."""

    frame: Frame
    instruction: Instruction
    path: tuple[int, ...]


def trips_of(module: Module, condition: Frame, body: Frame) -> int | None:
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


def _follow(module: Module, frame: Frame, name: str, path: tuple[int, ...] = ()) -> _Value:
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
            return follow(Frame(callee, frame, instruction), callee.root, path)
        case "parameter" if frame.caller and frame.instruction:
            run_by = frame.instruction
            if run_by.opcode in ("call", "fusion"):
                return follow(frame.caller, run_by.operands[int(instruction.operands[0])], path)
            if run_by.opcode == "while" and _is_carried_unchanged(module, run_by, path):
                return follow(frame.caller, run_by.operands[0], path)
    return _Value(frame, instruction, path)


def _is_carried_unchanged(module: Module, loop: Instruction, path: tuple[int, ...]) -> bool:
    body = module.computations[loop.callees[1]]
    # Without its caller, so that the search ends at the body's own parameter.
    result = _follow(module, Frame(body), body.root, path)
    return _is_parameter(result) and result.path == path
