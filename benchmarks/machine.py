"""The machine that a run was measured on, and how much memory there is."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, accelerator, versions, and how busy the machine was (load average of a minute)."""
    devices = jax.devices()
    return {
        "cpu": _entry("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpu_family_model": [_entry("/proc/cpuinfo", name) for name in ("cpu family", "model")],
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "platform": devices[0].platform,
        "accelerator": devices[0].device_kind,
        "devices": len(devices),
        "versions": {name: version(name) for name in PACKAGES},
    }


def free_bytes() -> int:
    """Memory that a program may still take: of the first device, or of the machine when that is the CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    available = _entry("/proc/meminfo", "MemAvailable")
    if available:
        return int(available.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes() -> int | None:
    """The most memory that this process ever held; None where the system does not tell (Linux does).

    Not `resource.getrusage`: there a child process inherits the peak of its parent.
    """
    peak = _entry("/proc/self/status", "VmHWM")
    return int(peak.split()[0]) * 1024 if peak else None


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Memory that a compiled program needs beside its arguments, on each device."""
    analysis: Any = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def _entry(path: str, name: str) -> str:
    """The value of the first line "name : value" of a file of Linux's /proc; "" without one."""
    file = Path(path)
    if not file.is_file():
        return ""
    lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
