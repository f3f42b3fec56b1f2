"""What a compiled program does on one device, read from the text of its optimised HLO.

XLA's `cost_analysis` counts the body of a loop once, however often it runs; a step in microbatches is nearly all loop.
So operations and traffic are counted here, instruction by instruction, times the turns of the loops around it.

Of the branches of a conditional the most expensive one counts, but for those in the scope `types.WARM_UP`, which most
steps of a training do not take: there it is the branch of all steps after the warm-up, or that of the warm-up if asked.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache

from shnet_jax.observe.hlo import Computation, Instruction, Shape, parse
from shnet_jax.observe.products import is_hidden, multiplications, precision
from shnet_jax.types import WARM_UP

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


@dataclass(frozen=True)
class Work:
    """What one run does on one device.

    flops: operations of matrix products and convolutions, two for each multiplication and addition.
    float32: those of them with operands in float32, by their `lax.Precision`: default, high or highest.
    bytes: read from and written to main memory, each time that it is. On-chip memory is not counted.
    collectives: bytes by kind: the whole array that this device ends up with (all-gather) or hands in (all others).
    loops_once: loops whose number of turns the program does not say; what is in them is counted once.
    hidden: calls of libraries and kernels whose operations the program does not say; they are not counted.
    """

    flops: float = 0.0
    float32: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)
    loops_once: int = 0
    hidden: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            _added(self.float32, other.float32),
            self.bytes + other.bytes,
            _added(self.collectives, other.collectives),
            self.loops_once + other.loops_once,
            self.hidden + other.hidden,
        )

    def times(self, turns: int) -> Work:
        """The same, so many times."""
        return Work(
            self.flops * turns,
            {kind: flops * turns for kind, flops in self.float32.items()},
            self.bytes * turns,
            {kind: size * turns for kind, size in self.collectives.items()},
            self.loops_once,
            self.hidden,
        )


def work(hlo: str | None, *, warm_up: bool = False) -> Work:
    """What the program of one device does; `hlo`: `compiled.as_text()`. Raises ValueError for another text.

    warm_up: in a step of the warm-up, instead of a step after it.
    """
    computations, entry = parse(hlo or "")
    return _Counter(computations, warm_up).total(entry)


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {kind: one.get(kind, 0.0) + other.get(kind, 0.0) for kind in {**one, **other}}


# No traffic of their own: they name what is there already, or what they call is counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "domain",
}  # fmt: skip
_OF_WARM_UP = re.compile(rf'op_name="[^"]*\b{WARM_UP}\)*/cond"')  # gradients add "transpose(jvp(...))" around the scope
_SLICES = {"dynamic-slice", "slice", "gather"}


class _Counter:
    def __init__(self, computations: dict[str, Computation], warm_up: bool):
        self._computations = computations
        self._warm_up = warm_up
        self.total = lru_cache(maxsize=None)(self._total)

    def _total(self, name: str) -> Work:
        """Of one call of a computation, with all that it calls."""
        here = self._computations[name]
        found = Work()
        for instruction in here.instructions.values():
            found += replace(self._of(here, instruction), bytes=self._traffic(here, instruction))
            found += self._calls(here, instruction)
        return found

    def _calls(self, here: Computation, instruction: Instruction) -> Work:
        match instruction.opcode:
            case "while":
                turns = self._turns(here, instruction)
                (body,), (condition,) = instruction.called("body"), instruction.called("condition")
                inside = self.total(body) + self.total(condition)
                return inside + Work(loops_once=1) if turns is None else inside.times(turns)
            case "conditional":
                keys = ("branch_computations", "false_computation", "true_computation")
                branches = [self.total(name) for key in keys for name in instruction.called(key)]
                if _OF_WARM_UP.search(instruction.attributes):
                    return branches[self._warm_up]  # of a `lax.cond`, the branch for false comes first
                return max(branches, key=lambda w: (w.flops, w.bytes))
            case "fusion":  # its inner values never reach main memory
                return sum((replace(self.total(name), bytes=0.0) for name in instruction.called("calls")), Work())
            case "call" | "async-start" | "custom-call":
                names = [*instruction.called("to_apply"), *instruction.called("calls")]
                return sum((self.total(name) for name in names), Work())
        return Work()

    def _of(self, here: Computation, instruction: Instruction) -> Work:
        """Operations and collectives of the instruction itself."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            # A -start gives a tuple of operands, results and more: what is done gives the results alone.
            handed_in = sum(s.bytes for operand in instruction.operands for s in here.instructions[operand].shapes)
            results = _done(here, instruction).shapes if opcode != instruction.opcode else instruction.shapes
            return Work(collectives={opcode: max(handed_in, sum(s.bytes for s in results))})
        if opcode in ("dot", "convolution", "custom-call"):
            shapes = [s for operand in instruction.operands for s in here.instructions[operand].shapes[:1]]
            if len(shapes) >= 2 and (count := multiplications(instruction, *shapes[:2])) is not None:
                flops = 2.0 * count
                found = precision(instruction, *shapes[:2])
                return Work(flops, {found: flops} if found else {})
            return Work(hidden=int(is_hidden(instruction)))
        return Work()

    def _traffic(self, here: Computation, instruction: Instruction) -> float:
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

    def _read(self, fused: Computation, number: int, size: float) -> float:
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

    def _written(self, fused: Computation, size: float) -> float:
        """What a fusion with a result of this size writes: only the part that it puts into an array in place."""
        root = fused.instructions[fused.root]
        while root.opcode == "bitcast":
            root = fused.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return min(size, fused.instructions[root.operands[1]].shapes[0].bytes)
        return size

    def _turns(self, here: Computation, loop: Instruction) -> int | None:
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


def _through(here: Computation, name: str) -> Instruction:
    """The instruction, or what it is only a copy of."""
    found = here.instructions[name]
    while found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        found = here.instructions[found.operands[0]]
    return found


def _constant(here: Computation, name: str) -> int | None:
    found = _through(here, name)
    return int(found.literal) if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.literal) else None


def _place(here: Computation, name: str) -> int | None:
    """Which element of the loop's state it is."""
    found = _through(here, name)
    if found.opcode != "get-tuple-element" or here.instructions[found.operands[0]].opcode != "parameter":
        return None
    return int(re.findall(r"index=(\d+)", found.attributes)[0])


def _step(body: Computation, name: str, place: int, start: Instruction, before: Computation) -> int | None:
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


def _done(here: Computation, start: Instruction) -> Instruction:
    return next((user for user in here.users[start.name] if user.opcode.endswith("-done")), start)


def _main(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if not shape.space)
