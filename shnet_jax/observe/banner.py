"""First lines of a long command: devices, processes, work folder, and an accelerator that JAX does not use."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import jax
import numpy as np

GOOGLE = "0x1ae0"
"""PCI vendor of TPUs."""
INSTALL = {"GPU": "pip install -U 'jax[cuda12]'", "TPU": "pip install -U 'jax[tpu]'"}


def banner(mode: str, workdir: str | Path) -> str:
    """One line: the mode, number and kind of the devices, processes, the work folder. Initialises JAX's backend."""
    kinds = Counter(device.device_kind for device in jax.devices())
    devices = " and ".join(f"{count} x {kind}" for kind, count in kinds.items())
    count = jax.process_count()
    return f"{mode}: {devices}, {count} process{'es' if count > 1 else ''}, work folder {workdir}"


def parameter_count(params: object) -> str:
    """Number of parameters of a pytree of arrays, as "3.4 M"."""
    count = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(params))
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def unused_accelerator(root: Path = Path("/")) -> str | None:
    """Warning about an accelerator that the machine shows while JAX uses the CPU, with the line that installs support.

    None where there is none, or where JAX_PLATFORMS asks for the CPU. root: of the file system, for tests.
    """
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    vendors = {path.read_text().strip() for path in root.glob("sys/bus/pci/devices/*/vendor")}
    if any(root.glob("dev/nvidia[0-9]*")):
        kind = "GPU"
    elif GOOGLE in vendors and (any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*"))):
        kind = "TPU"
    else:
        return None
    return (
        f"this machine has a {kind}, but JAX runs on the CPU: {INSTALL[kind]} adds support for it, JAX_PLATFORMS=cpu "
        "chooses the CPU on purpose"
    )
