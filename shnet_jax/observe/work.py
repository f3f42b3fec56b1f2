"""FLOPs, memory traffic and collectives of one device, counted in the text of a compiled program (optimised HLO).

XLA's `cost_analysis` counts the body of a loop once, however often it runs, and a step in microbatches is nearly all
loop. So every instruction is counted here, times the trip counts of the loops around it. The jaxpr is not what runs:
XLA merges equal products. It has up to 5 % more FLOPs (configs/scenes.py in microbatches with exact statistics), and a
third of the memory traffic at most.

The most expensive branch of a conditional counts. A conditional in the scope `types.WARM_UP` is different: it counts
the branch of the steps after the warm-up, or that of the warm-up if asked.
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
    """FLOPs, bytes and collectives of one run of a program on one device.

    flops: operations of matrix products and convolutions; a multiplication and an addition are two.
    float32: those of `flops` with operands in float32, by `lax.Precision`: default, high or highest.
    bytes: read from and written to main memory, each time. On-chip memory is not counted.
    collectives: bytes by kind: of the whole result for all-gather, of the operands for the others.
    loops_once: loops of unknown trip count; their bodies are counted once.
    hidden: calls of libraries and kernels whose operations the program does not state; they are not counted.
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

    def times(self, count: int) -> Work:
        """The work of `count` runs."""
        float32, collectives = (
            {name: value * count for name, value in values.items()} for values in (self.float32, self.collectives)
        )
        return replace(
            self, flops=self.flops * count, float32=float32, bytes=self.bytes * count, collectives=collectives
        )


def work(hlo: str | None) -> Work:
    """Work of a compiled program on one device, in a step after the loss's warm-up.

    hlo: `compiled.as_text()`. Raises ValueError for any other text.
    """
    computations, entry = parse(hlo or "")
    return _Counter(computations, False).total(entry)


def steady_and_warm_up(hlo: str | None) -> tuple[Work, Work]:
    """Work of a step after the loss's warm-up, and of one in it; `hlo` as in `work`, read once."""
    computations, entry = parse(hlo or "")
    return _Counter(computations, False).total(entry), _Counter(computations, True).total(entry)


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    if not one or not other:
        return one or other
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


# No traffic of their own: they name what is there already, or what they call is counted.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "domain",
}  # fmt: skip
_IN_WARM_UP = re.compile(rf'op_name="[^"]*\b{WARM_UP}\)*/cond"')  # gradients add "transpose(jvp(...))" around the scope
_ALIASES = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}")
_DONE = "async-collective-done"
_SLICES = {"dynamic-slice", "slice", "gather"}
_CALLS = {"while", "conditional", "fusion", "call", "async-start", "custom-call"}
_PRODUCTS = {"dot", "convolution", "custom-call"}


class _Counter:
    def __init__(self, computations: dict[str, Computation], warm_up: bool):
        self._computations = computations
        self._warm_up = warm_up
        self.total = lru_cache(maxsize=None)(self._total)

    def _total(self, name: str) -> Work:
        """Work of one run of a computation, with everything it calls."""
        computation = self._computations[name]
        instructions = computation.instructions.values()
        total = Work(bytes=sum(self._traffic(computation, instruction) for instruction in instructions))
        for instruction in instructions:
            if instruction.opcode in _CALLS:
                total += self._called(computation, instruction)
            if instruction.opcode in _PRODUCTS:
                total += _product(computation, instruction)
            elif instruction.opcode.removesuffix("-start") in COLLECTIVES:
                total += _collective(computation, instruction)
        return total

    def _called(self, computation: Computation, instruction: Instruction) -> Work:
        """Work of the computations that the instruction calls."""
        match instruction.opcode:
            case "while":
                trip_count = self._trip_count(computation, instruction)
                (body,), (condition,) = instruction.called("body"), instruction.called("condition")
                inside = self.total(body) + self.total(condition)
                return inside + Work(loops_once=1) if trip_count is None else inside.times(trip_count)
            case "conditional":
                keys = ("branch_computations", "false_computation", "true_computation")
                branches = [self.total(name) for key in keys for name in instruction.called(key)]
                if _IN_WARM_UP.search(instruction.attributes):
                    return branches[self._warm_up]  # the branch for false is the first one of a `lax.cond`
                return max(branches, key=lambda w: (w.flops, w.bytes))
            case "fusion":  # its inner values never reach main memory
                fused = (replace(self.total(name), bytes=0.0) for name in instruction.called("calls"))
                return sum((_of_fusion(instruction, work) for work in fused), Work())
        names = [*instruction.called("to_apply"), *instruction.called("calls")]
        return sum((self.total(name) for name in names), Work())

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes of main memory that the instruction reads and writes."""
        opcode = instruction.opcode
        if opcode in _FREE:
            return 0.0
        operands = [computation.instructions[name] for name in instruction.operands]
        written = _main(instruction.shapes)
        if _is_under_way(instruction):
            return 0.0 if instruction.name.startswith(_DONE) else self._traffic_beside(instruction, operands)
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

    def _traffic_beside(self, instruction: Instruction, operands: list[Instruction]) -> float:
        """Bytes of a fusion that computes while a collective is under way, whose arrays it only passes on."""
        aliases = _ALIASES.search(instruction.attributes)
        passed = re.findall(r"\{(\d+)\}: \((\d+),", aliases[1]) if aliases else []
        results, arrays = {int(result) for result, _ in passed}, {int(array) for _, array in passed}
        fused = self._computations[instruction.called("calls")[0]]
        read = (self._read(fused, i, _main(x.shapes)) for i, x in enumerate(operands) if i not in arrays)
        return sum(read) + _main(tuple(shape for i, shape in enumerate(instruction.shapes) if i not in results))

    def _read(self, fused: Computation, number: int, size: float) -> float:
        """Bytes that a fusion reads from an operand of `size` bytes: less than all if it only takes slices."""
        if not size:
            return 0.0
        name = fused.parameters[number]
        read = 0.0
        for user in fused.users[name]:
            if user.opcode in _SLICES and user.operands[0] == name:
                read += user.shapes[0].bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return size
        return min(read, size)

    def _written(self, fused: Computation, size: float) -> float:
        """Bytes that a fusion with a result of `size` bytes writes: less than all if it updates a slice in place."""
        root = fused.instructions[fused.root]
        while root.opcode == "bitcast":
            root = fused.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return min(size, fused.instructions[root.operands[1]].shapes[0].bytes)
        return size

    def _trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Trip count as the compiler notes it, or of a counter compared with a constant; None if it is unknown."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return int(noted[1])
        condition, body = (self._computations[loop.called(key)[0]] for key in ("condition", "body"))
        test = condition.instructions[condition.root]
        if test.opcode != "compare" or "direction=LT" not in test.attributes or len(test.operands) != 2:
            return None
        start = computation.instructions[loop.operands[0]]
        following = body.instructions[body.root]
        position = _position(condition, test.operands[0])
        limit = _constant(condition, test.operands[1])
        if limit is None and (at := _position(condition, test.operands[1])) is not None and start.opcode == "tuple":
            limit = _constant(computation, start.operands[at])
        if position is None or limit is None or start.opcode != "tuple" or following.opcode != "tuple":
            return None
        first = _constant(computation, start.operands[position])
        step = _step(body, following.operands[position], position, start, computation)
        return None if first is None or not step else max(0, math.ceil((limit - first) / step))


def _product(computation: Computation, instruction: Instruction) -> Work:
    """FLOPs of a product or convolution, or of a library call that states its operations."""
    shapes = [s for operand in instruction.operands for s in computation.instructions[operand].shapes[:1]]
    if len(shapes) >= 2 and (count := multiplications(instruction, *shapes[:2])) is not None:
        flops = 2.0 * count
        at = precision(instruction, *shapes[:2])
        return Work(flops, {at: flops} if at else {})
    return Work(hidden=int(is_hidden(instruction)))


def _collective(computation: Computation, instruction: Instruction) -> Work:
    """Bytes of a collective."""
    kind = instruction.opcode.removesuffix("-start")
    operands = sum(s.bytes for operand in instruction.operands for s in computation.instructions[operand].shapes)
    # The tuple of a -start holds operands, results and more; its -done has the results alone.
    results = _done(computation, instruction).shapes if kind != instruction.opcode else instruction.shapes
    return Work(collectives={kind: max(operands, sum(s.bytes for s in results))})


def _of_fusion(fusion: Instruction, work: Work) -> Work:
    """Work of a fusion. Two kinds of a TPU hold collectives.

    A reduce-scatter is a fusion of that name, of an all-reduce and the slice that is kept. A collective beside other
    work is the fusion async-collective-start; those that go on with it, perhaps in a loop, name it once more each.
    """
    if _is_under_way(fusion):
        return replace(work, collectives={})
    if not any(name.startswith("all-reduce-scatter") for name in fusion.called("calls")):
        return work
    return replace(work, collectives={"reduce-scatter": work.collectives.get("all-reduce", 0.0)})


def _is_under_way(instruction: Instruction) -> bool:
    """Whether the instruction goes on with, or ends, a collective that another one began."""
    if instruction.opcode != "fusion":
        return False
    names = instruction.called("calls")
    return instruction.name.startswith(_DONE) or any(name.startswith("async_collective_fusion") for name in names)


def _uncopied(computation: Computation, name: str) -> Instruction:
    """Instruction behind copies, bitcasts and conversions."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    """Value of an integer constant; None for anything else."""
    instruction = _uncopied(computation, name)
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    return int(instruction.literal) if is_integer else None


def _position(computation: Computation, name: str) -> int | None:
    """Position in the loop's state that the instruction reads; None if it reads something else."""
    instruction = _uncopied(computation, name)
    if instruction.opcode != "get-tuple-element":
        return None
    if computation.instructions[instruction.operands[0]].opcode != "parameter":
        return None
    return int(re.findall(r"index=(\d+)", instruction.attributes)[0])


def _step(body: Computation, name: str, position: int, start: Instruction, before: Computation) -> int | None:
    """Constant that each trip adds to the counter at this position of the state; None if there is none."""
    addition = _uncopied(body, name)
    if addition.opcode != "add":
        return None
    for counter, addend in (addition.operands, addition.operands[::-1]):
        if _position(body, counter) == position:
            constant = _constant(body, addend)
            at = _position(body, addend)  # a constant that was made before the loop
            return constant if constant is not None or at is None else _constant(before, start.operands[at])
    return None


def _done(computation: Computation, start: Instruction) -> Instruction:
    """Instruction -done that completes an asynchronous -start."""
    return next((user for user in computation.users[start.name] if user.opcode.endswith("-done")), start)


def _main(shapes: tuple[Shape, ...]) -> float:
    """Bytes of the arrays that lie in main memory."""
    return sum(shape.bytes for shape in shapes if not shape.space)
