"""Compilation, and the memory that a program takes by the compiler's account. `observe.work` counts its operations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory that a program takes on one device."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of arguments (donated)
    temporaries: int
    code: int

    @property
    def peak(self) -> int:
        """Bytes that must be free to run the program. Temporaries share space where the compiler can arrange it."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class OutOfMemory(Exception):
    """The compiler cannot fit the program in memory. needed, available: bytes; None if it does not say."""

    def __init__(self, message: str, needed: float | None, available: float | None):
        super().__init__(message)
        self.needed, self.available = needed, available


def compile_lowered(lowered: jax.stages.Lowered, effort: float = 0.0) -> jax.stages.Compiled:
    """Compiles a program. effort: of the compiler's optimisation, from -1 (least, compiles sooner) to 0 (usual).

    Raises OutOfMemory when the program does not fit in memory.
    """
    try:
        return _compile(lowered, effort)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", text)
        used = used or re.search(r"\(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", text)
        needed, available = (_size(x) for x in used.groups()) if used else (None, None)
        raise OutOfMemory(text.strip(), needed, available) from None


def _compile(lowered: jax.stages.Lowered, effort: float) -> jax.stages.Compiled:
    if not effort:
        return lowered.compile()
    options: dict[str, Any] = {"exec_time_optimization_effort": effort}
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
    return lowered.compile({"optimization_level": "O1"})  # jaxlib 0.12 knows levels only; this is the least but none


def _size(text: str) -> float:
    """Bytes that a text like "30.5G" stands for."""
    unit = "KMGT".find(text[-1]) + 1
    return float(text[:-1] if unit else text) * 1024**unit


def memory(compiled: jax.stages.Compiled) -> Memory:
    """The compiler's memory figures for one device. Raises ValueError if it has none."""
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
