"""Parser for the text of an optimised HLO module, as XLA writes it for CPUs, GPUs and TPUs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Shape:
    """Type of an array. space: number of the memory it lies in; 0 is main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @cached_property
    def bytes(self) -> float:
        """Size in memory, without padding."""
        if self.dtype in ("token", "opaque"):
            return 0.0
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """An instruction, written as `NAME = SHAPES OPCODE(LITERAL), ATTRIBUTES`.

    shapes: of the result; a tuple is flattened. operands: names in the literal.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def called(self, key: str) -> list[str]:
        """Names of the computations in an attribute, such as `body=%a` or `branch_computations={%a, %b}`."""
        match = re.search(rf"[ ,]{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"%?([\w.\-]+)", match[1]) if match else []


@dataclass(frozen=True)
class Computation:
    """A function of the module: its instructions by name. root: name of the one that is the result."""

    instructions: dict[str, Instruction]
    root: str

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(i.literal): i.name for i in self.instructions.values() if i.opcode == "parameter"}


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_PARENTHESIS = re.compile(r"[()]")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """Reads a module: (computations by name, name of the entry). Raises ValueError for any other text."""
    computations: dict[str, Computation] = {}
    body: dict[str, Instruction] = {}
    entry, name, root = "", "", ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name, body = header[2], {}
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(body, root)
        elif name and (named := _NAMED.match(line)):
            body[named[2]] = _instruction(named[2], named[3])
            root = named[2] if named[1] else root
    if not entry:
        raise ValueError("this is no text of an HLO module: it has no ENTRY")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    """Reads `TYPE opcode(operands), attributes`."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes = tuple(_shape(*match.groups()) for match in _SHAPE.finditer(text[:end]))
    rest = text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, shapes, rest[:opening], operands, literal, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Position at which the parenthesis closes."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"HLO: no closing parenthesis in {text[:80]!r}")


@lru_cache(maxsize=2**14)  # a program repeats few shapes many times
def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(size.strip("<= ")) for size in dims.split(",") if size)
    space = re.search(r"S\((\d+)\)", layout or "")
    return Shape(dtype, sizes, int(space[1]) if space else 0)
