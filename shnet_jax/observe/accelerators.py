"""Check that an extra for accelerators, cuda12, cuda13 or tpu, suits this machine: `python THIS_FILE EXTRA ...`.

`make setup EXTRAS=cuda12` runs it before anything is installed, so it imports the standard library alone.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

GOOGLE = "0x1ae0"
"""PCI vendor of TPUs."""


class Cuda(NamedTuple):
    """Least version of the NVIDIA driver, and least compute capability of a GPU, of a CUDA release (JAX, NVIDIA)."""

    driver: int
    capability: float


CUDA = {"cuda12": Cuda(525, 5.2), "cuda13": Cuda(580, 7.5)}
EXTRAS = (*CUDA, "tpu")

SKIP = "to install for another machine: make setup EXTRAS={extra} CHECK_MACHINE="


def has_tpu(root: Path = Path("/")) -> bool:
    """Whether Linux shows a TPU: Google's PCI device and its device file. root: of the file system, for tests."""
    vendors = {path.read_text().strip() for path in root.glob("sys/bus/pci/devices/*/vendor")}
    return GOOGLE in vendors and (any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")))


def nvidia_smi() -> str | None:
    """Lines "driver version, compute capability", one for each GPU, as nvidia-smi gives them; None without it."""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def fault(
    extra: str,
    system: str = f"{platform.system()} {platform.machine()}",
    gpus: Callable[[], str | None] = nvidia_smi,
    root: Path = Path("/"),
) -> str | None:
    """The reason why this machine cannot use an extra, with the one to choose instead; None if it can."""
    if extra == "tpu":
        return _tpu_fault(system, root)
    if system not in ("Linux x86_64", "Linux aarch64"):
        return f"{extra} is for Linux on x86_64 or aarch64, this is {system}: make setup installs JAX for the CPU"
    gpus_shown = re.findall(r"^(\d+)[\d.]*, *(\d+\.\d+)", gpus() or "", re.MULTILINE)
    if not gpus_shown:
        other = "; this machine has a TPU: EXTRAS=tpu" if has_tpu(root) else ""
        return (
            f"{extra} needs an NVIDIA GPU, and nvidia-smi shows none{other}. Without a GPU: make setup; "
            f"{SKIP.format(extra=extra)}"
        )
    driver, capability = min(int(d) for d, _ in gpus_shown), min(float(c) for _, c in gpus_shown)
    needed = CUDA[extra]
    if driver >= needed.driver and capability >= needed.capability:
        return None
    fits = [name for name, cuda in CUDA.items() if driver >= cuda.driver and capability >= cuda.capability]
    remedy = f"choose EXTRAS={fits[-1]}" if fits else "update the driver, or install for the CPU: make setup"
    return (
        f"{extra} needs driver {needed.driver} or newer and compute capability {needed.capability} or more; found "
        f"driver {driver}, capability {capability}: {remedy}"
    )


def _tpu_fault(system: str, root: Path) -> str | None:
    if system != "Linux x86_64":
        return f"tpu is for Linux on x86_64, for which alone libtpu is made; this is {system}: make setup"
    if has_tpu(root):
        return None
    return (
        "tpu needs a TPU, and there is neither /dev/accel* nor /dev/vfio/* of one. On a TPU VM, run as a user that "
        "sees them; for plans without a TPU: make tpu-compiler; " + SKIP.format(extra="tpu")
    )


def main(extras: Sequence[str]) -> int:
    """Exit status: 1 if one of the extras does not suit this machine, which is said in a line."""
    chosen = [extra for extra in extras if extra in EXTRAS]
    if len(chosen) > 1:
        print(f"error: choose one of {', '.join(chosen)}: an environment has one kind of accelerator", file=sys.stderr)
        return 1
    message = fault(chosen[0]) if chosen else None
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
    return int(message is not None)


if __name__ == "__main__":
    sys.exit(main([extra for argument in sys.argv[1:] for extra in argument.split(",")]))
