"""First lines of a long command: devices, processes, work folder, and an accelerator that JAX does not use."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from shnet_jax.observe.accelerators import has_tpu

INSTALL = {
    "GPU": "make setup EXTRAS=cuda13, or cuda12 for a driver before 580 (pip install 'shnet_jax[cuda13]')",
    "TPU": "make setup EXTRAS=tpu (pip install 'shnet_jax[tpu]')",
}


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
    if any(root.glob("dev/nvidia[0-9]*")):
        kind = "GPU"
    elif has_tpu(root):
        kind = "TPU"
    else:
        return None
    return (
        f"this machine has a {kind}, but JAX runs on the CPU: {INSTALL[kind]} adds support for it; JAX_PLATFORMS=cpu "
        "chooses the CPU on purpose"
    )
