"""The machine that a run was measured on, and how much memory there is."""

from __future__ import annotations

import os
from typing import Any

import jax

from shnet_jax.observe import machine


def describe() -> dict[str, Any]:
    """`observe.machine.describe`, with memory, processor family and how busy it was (load average of a minute)."""
    return machine.describe() | {
        "cpu_family_model": [machine.entry("/proc/cpuinfo", name) for name in ("cpu family", "model")],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
    }


def free_bytes() -> int:
    """Memory that a program may still take: of the first device, or of the machine when that is the CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    available = machine.entry("/proc/meminfo", "MemAvailable")
    if available:
        return int(available.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int | None:
    """The most memory that this process ever held; None where the system does not tell (Linux does).

    Not `resource.getrusage`: there a child process inherits the peak of its parent.
    """
    peak = machine.entry("/proc/self/status", "VmHWM")
    return int(peak.split()[0]) * 1024 if peak else None


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory that a compiled program needs beside its arguments, on each device."""
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
