"""Description of the machine that a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def describe() -> dict[str, Any]:
    """Devices as JAX sees them, processor, cores and versions, all of which stay the same from run to run."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "cpu": entry("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


BFLOAT16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""Instructions for bfloat16 products, by their names in Linux's list, that XLA uses on x86."""
BFLOAT16_CAPABILITY = 8.0
"""CUDA compute capability of the first GPUs that are fast at bfloat16 (Ampere)."""


def fast_dtype(device: jax.Device) -> tuple[str, str]:
    """The dtype whose matrix products are fastest on a device, "bfloat16" or "float32", and why.

    bfloat16 on TPUs, on NVIDIA GPUs from BFLOAT16_CAPABILITY on and on CPUs with one of BFLOAT16_FLAGS, as Linux tells
    them. Everywhere else float32: on a CPU without them a step in bfloat16 takes 1.5 times as long.
    """
    if device.platform == "tpu":
        return "bfloat16", "a TPU"
    if device.platform == "gpu":
        capability = str(getattr(device, "compute_capability", ""))
        fast = bool(re.fullmatch(r"\d+(\.\d+)?", capability)) and float(capability) >= BFLOAT16_CAPABILITY
        return "bfloat16" if fast else "float32", f"a GPU of compute capability {capability or 'unknown'}"
    flags = BFLOAT16_FLAGS.keys() & entry("/proc/cpuinfo", "flags").split()
    if device.platform == "cpu" and flags:
        return "bfloat16", f"a CPU with {' and '.join(sorted(BFLOAT16_FLAGS[flag] for flag in flags))}"
    return "float32", f"a {device.platform.upper()} without {' or '.join(BFLOAT16_FLAGS.values())}"


def entry(path: str, name: str) -> str:
    """The value of the first line "name : value" of a file of Linux's /proc; "" without one."""
    file = Path(path)
    if not file.is_file():
        return ""
    lines = (line.partition(":") for line in file.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")
