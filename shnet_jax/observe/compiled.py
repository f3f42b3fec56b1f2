"""What a compiled program costs one device, read from the text of its optimised HLO and the compiler's own figures.

XLA's `cost_analysis` counts the body of a loop once, however often it runs; a step in microbatches is nearly all loop.
So operations and traffic are counted here, instruction by instruction, times the turns of the loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import zip_longest
from typing import Any

import jax

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's main memory."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments (donated)
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """What has to be free: everything together. Temporaries share their space where the compiler can."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Work:
    """What one run does on one device.

    flops: operations of matrix products and convolutions, two for each multiplication and addition.
    passes: the same in bfloat16 passes of a TPU's matrix unit: a float32 product takes 6 at the highest precision, 3 at
      high (JAX, `lax.Precision`).
    bytes: read from and written to main memory, each time that it is. On-chip memory is not counted.
    collectives: bytes by kind: the whole array that this device ends up with (all-gather) or hands in (all others).
    loops_once: loops whose number of turns the program does not say; what is in them is counted once.
    """

    flops: float = 0.0
    passes: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)
    loops_once: int = 0

    def __add__(self, other: Work) -> Work:
        kinds = {**self.collectives, **other.collectives}
        return Work(
            self.flops + other.flops,
            self.passes + other.passes,
            self.bytes + other.bytes,
            {kind: self.collectives.get(kind, 0.0) + other.collectives.get(kind, 0.0) for kind in kinds},
            self.loops_once + other.loops_once,
        )

    def times(self, turns: int) -> Work:
        """The same, so many times."""
        return Work(
            self.flops * turns,
            self.passes * turns,
            self.bytes * turns,
            {kind: size * turns for kind, size in self.collectives.items()},
            self.loops_once,
        )


class OutOfMemory(Exception):
    """The compiler finds no way to fit the program in memory. needed, available: bytes, None when it does not say."""

    def __init__(self, message: str, needed: float | None, available: float | None):
        super().__init__(message)
        self.needed, self.available = needed, available


def compile_lowered(lowered: jax.stages.Lowered, effort: float = 0.0) -> jax.stages.Compiled:
    """`lowered.compile()`; raises OutOfMemory when the compiler says that the program does not fit.

    effort: of the compiler to make the program fast, from -1 (the least; it compiles sooner) to 1; 0: as usual.
    """
    options: dict[str, Any] = {"exec_time_optimization_effort": effort}
    try:
        return lowered.compile(options) if effort else lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", text)
        used = used or re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", text)
        needed, available = (_size(x) for x in used.groups()) if used else (None, None)
        raise OutOfMemory(text.strip(), needed, available) from None


def _size(text: str) -> float:
    """Bytes of "30.5G"."""
    unit = "KMGT".find(text[-1]) + 1
    return float(text[:-1] if unit else text) * 1024**unit


def memory(compiled: jax.stages.Compiled) -> Memory:
    """The compiler's figures for one device. Raises ValueError for a compiler that has none."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this compiler does not say how much memory a program takes")
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def work(hlo: str | None) -> Work:
    """What the program of one device does; `hlo`: `compiled.as_text()`. Raises ValueError for another text."""
    computations, entry = _parse(hlo or "")
    return _Counter(computations).total(entry)


# ------------------------------------------------------------------------------------------------ the text of a program


@dataclass(frozen=True)
class _Shape:
    """An array: bytes, sizes of its axes, and the memory it lies in, 0: the main one."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @cached_property
    def bytes(self) -> float:
        if self.dtype in ("token", "opaque"):
            return 0.0
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits / 8


@dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: tuple[_Shape, ...]  # one, or those of a tuple (flat)
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str

    def called(self, key: str) -> list[str]:
        """Names of the computations in an attribute: `body=%a`, `branch_computations={%a, %b}`."""
        found = re.search(rf"[ ,]{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"%?([\w.\-]+)", found[1]) if found else []


@dataclass(frozen=True)
class _Computation:
    instructions: dict[str, _Instruction]
    root: str

    @cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        """Who reads each instruction."""
        found: dict[str, list[_Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.literal): i.name for i in self.instructions.values() if i.opcode == "parameter"}


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    body: dict[str, _Instruction] = {}
    entry, name, root = "", "", ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name, body = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = _Computation(body, root)
        elif name and (named := _NAMED.match(line)):
            body[named[2]] = _instruction(named[2], named[3])
            root = named[2] if named[1] else root
    if not entry:
        raise ValueError("this is no text of an HLO module: it has no ENTRY")
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    """From `TYPE opcode(operands), attributes`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes = tuple(_shape(found) for found in _SHAPE.finditer(text[:end]))
    rest = text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return _Instruction(name, shapes, rest[:opening], operands, literal, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"HLO: no closing parenthesis in {text[:80]!r}")


def _shape(found: re.Match[str]) -> _Shape:
    dims = tuple(int(size.strip("<= ")) for size in found[2].split(",") if size)
    space = re.search(r"S\((\d+)\)", found[3] or "")
    return _Shape(found[1], dims, int(space[1]) if space else 0)


# ------------------------------------------------------------------------------------------------------------- counting

# No traffic of their own: they name what is there already, or what they call is counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "domain",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


class _Counter:
    def __init__(self, computations: dict[str, _Computation]):
        self._computations = computations
        self.total = lru_cache(maxsize=None)(self._total)

    def _total(self, name: str) -> Work:
        """Of one call of a computation, with all that it calls."""
        here = self._computations[name]
        found = Work()
        for instruction in here.instructions.values():
            found += replace(self._of(here, instruction), bytes=self._traffic(here, instruction))
            found += self._calls(here, instruction)
        return found

    def _calls(self, here: _Computation, instruction: _Instruction) -> Work:
        match instruction.opcode:
            case "while":
                turns = self._turns(here, instruction)
                (body,), (condition,) = instruction.called("body"), instruction.called("condition")
                inside = self.total(body) + self.total(condition)
                return inside + Work(loops_once=1) if turns is None else inside.times(turns)
            case "conditional":  # the most expensive branch
                branches = [
                    name
                    for key in ("branch_computations", "true_computation", "false_computation")
                    for name in instruction.called(key)
                ]
                return max((self.total(name) for name in branches), key=lambda w: (w.flops, w.bytes))
            case "fusion":  # its inner values never reach main memory
                return sum((replace(self.total(name), bytes=0.0) for name in instruction.called("calls")), Work())
            case "call" | "async-start" | "custom-call":
                names = [*instruction.called("to_apply"), *instruction.called("calls")]
                return sum((self.total(name) for name in names), Work())
        return Work()

    def _of(self, here: _Computation, instruction: _Instruction) -> Work:
        """Operations and collectives of the instruction itself."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            # A -start gives a tuple of operands, results and more: what is done gives the results alone.
            handed_in = sum(s.bytes for operand in instruction.operands for s in here.instructions[operand].shapes)
            results = _done(here, instruction).shapes if opcode != instruction.opcode else instruction.shapes
            return Work(collectives={opcode: max(handed_in, sum(s.bytes for s in results))})
        if opcode in ("dot", "convolution"):
            left, right = (here.instructions[operand].shapes[0] for operand in instruction.operands)
            count = _dot if opcode == "dot" else _convolution
            flops = 2.0 * count(instruction, left, right)
            return Work(flops, flops * _passes(instruction, left, right))
        return Work()

    def _traffic(self, here: _Computation, instruction: _Instruction) -> float:
        """Bytes of main memory that the instruction reads and writes."""
        opcode = instruction.opcode
        if opcode in _FREE:
            return 0.0
        operands = [here.instructions[name] for name in instruction.operands]
        written = _main(instruction.shapes)
        if opcode in _SLICES:
            return min(written, _main(operands[0].shapes)) + written
        if opcode == "dynamic-update-slice":
            return 2.0 * min(written, sum(s.bytes for s in operands[1].shapes))
        if opcode.endswith("-start"):
            return sum(_main(operand.shapes) for operand in operands)
        if opcode.endswith("-done"):
            return written
        called = instruction.called("calls") if opcode == "fusion" else []
        if called:
            fused = self._computations[called[0]]
            read = sum(self._read(fused, i, _main(operand.shapes)) for i, operand in enumerate(operands))
            return read + self._written(fused, written)
        return written + sum(_main(operand.shapes) for operand in operands)

    def _read(self, fused: _Computation, number: int, size: float) -> float:
        """What a fusion reads of an operand of this size: only slices of it, if that is all it makes of it."""
        if not size:
            return 0.0
        name = fused.parameters[number]
        found = 0.0
        for user in fused.users[name]:
            if user.opcode in _SLICES and user.operands[0] == name:
                found += user.shapes[0].bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return size
        return min(found, size)

    def _written(self, fused: _Computation, size: float) -> float:
        """What a fusion with a result of this size writes: only the part that it puts into an array in place."""
        root = fused.instructions[fused.root]
        while root.opcode == "bitcast":
            root = fused.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return min(size, fused.instructions[root.operands[1]].shapes[0].bytes)
        return size

    def _turns(self, here: _Computation, loop: _Instruction) -> int | None:
        """How often a loop runs: as the compiler notes it, or of a counter that is compared with a constant."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(noted[1])
        condition, body = (self._computations[loop.called(key)[0]] for key in ("condition", "body"))
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.attributes or len(test.operands) != 2:
            return None
        start = here.instructions[loop.operands[0]]
        next_ = body.instructions[body.root]
        place = _place(condition, test.operands[0])
        limit = _constant(condition, test.operands[1])
        if limit is None and (at := _place(condition, test.operands[1])) is not None and start.opcode == "tuple":
            limit = _constant(here, start.operands[at])
        if place is None or limit is None or start.opcode != "tuple" or next_.opcode != "tuple":
            return None
        first = _constant(here, start.operands[place])
        step = _step(body, next_.operands[place], place, start, here)
        return None if first is None or not step else max(0, math.ceil((limit - first) / step))


def _through(here: _Computation, name: str) -> _Instruction:
    """The instruction, or what it is only a copy of."""
    found = here.instructions[name]
    while found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        found = here.instructions[found.operands[0]]
    return found


def _constant(here: _Computation, name: str) -> int | None:
    found = _through(here, name)
    return int(found.literal) if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.literal) else None


def _place(here: _Computation, name: str) -> int | None:
    """Which element of the loop's state it is."""
    found = _through(here, name)
    if found.opcode != "get-tuple-element" or here.instructions[found.operands[0]].opcode != "parameter":
        return None
    return int(re.findall(r"index=(\d+)", found.attributes)[0])


def _step(body: _Computation, name: str, place: int, start: _Instruction, before: _Computation) -> int | None:
    """What a turn adds to the counter."""
    found = _through(body, name)
    if found.opcode != "add":
        return None
    for counter, addend in (found.operands, found.operands[::-1]):
        if _place(body, counter) == place:
            constant = _constant(body, addend)
            at = _place(body, addend)  # a constant that was made before the loop
            return constant if constant is not None or at is None else _constant(before, start.operands[at])
    return None


def _done(here: _Computation, start: _Instruction) -> _Instruction:
    return next((user for user in here.users[start.name] if user.opcode.endswith("-done")), start)


def _main(shapes: tuple[_Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if not shape.space)


def _passes(instruction: _Instruction, left: _Shape, right: _Shape) -> int:
    if "f32" not in (left.dtype, right.dtype):
        return 1
    precision = re.search(r"operand_precision=\{(\w+)", instruction.attributes)
    return {"highest": 6, "high": 3}.get(precision[1], 1) if precision else 1


def _dot(instruction: _Instruction, left: _Shape, right: _Shape) -> float:
    """Multiplications."""
    del right
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [int(axis) for axis in found[1].split(",") if axis] if found else []
    return math.prod(instruction.shapes[0].dims) * math.prod(left.dims[axis] for axis in contracted)


def _convolution(instruction: _Instruction, left: _Shape, right: _Shape) -> float:
    """Multiplications that are not with padding: batched products on TPU are convolutions with much of it."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"HLO: a convolution without dim_labels: {instruction.name}")
    of_input, of_kernel, of_output = labels.groups()
    out = instruction.shapes[0].dims
    count = float(out[of_output.index("b")] * out[of_output.index("f")] * right.dims[of_kernel.index("i")])
    window = dict(
        re.findall(r"(\w+)=([\w\-]+)", (re.findall(r"window=\{([^}]*)\}", instruction.attributes) or [""])[0])
    )
    axes = sorted(label for label in of_kernel if label.isdecimal())
    options = {key: window[key].split("x") if key in window else [] for key in _WINDOW}
    rows = list(zip_longest(*options.values()))
    for number, label in enumerate(axes):
        given = dict(zip(options, rows[number], strict=True)) if number < len(rows) else {}
        stride, low, lhs, rhs = (_window_value(given.get(key), key) for key in _WINDOW)
        count *= _inside(
            left.dims[of_input.index(label)], right.dims[of_kernel.index(label)], out[of_output.index(label)],
            stride, low, lhs, rhs,
        )  # fmt: skip
    return count


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _window_value(text: str | None, key: str) -> int:
    if text is None:
        return 0 if key == "pad" else 1
    return int(text.split("_")[0]) if key == "pad" else int(text)


def _inside(size: int, kernel: int, out: int, stride: int, low: int, lhs: int, rhs: int) -> int:
    """Pairs of an output and a kernel position that meet a value of the input along one axis."""
    return sum(1 for position in _positions(kernel, out, stride, low, rhs) if _is_value(position, size, lhs))


def _positions(kernel: int, out: int, stride: int, low: int, rhs: int) -> Iterator[int]:
    return (o * stride + k * rhs - low for o in range(out) for k in range(kernel))


def _is_value(position: int, size: int, lhs: int) -> bool:
    return 0 <= position <= (size - 1) * lhs and position % lhs == 0
