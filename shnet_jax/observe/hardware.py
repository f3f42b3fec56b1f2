"""Peaks of known chips, and the TPU slices and devices that a program can be compiled for."""

from __future__ import annotations

import contextlib
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30

HEADROOM = 0.1
"""Fraction of a GPU's memory that the driver, libraries and fragmentation take."""


class Chip(NamedTuple):
    """Peaks of one device.

    flops: dense bfloat16 FLOP/s. memory: bytes of HBM. bandwidth: bytes per second of HBM.
    tf32, float32: FLOP/s of a GPU with float32 operands, in the tensor cores (dense, rounded to TF32) and outside of
      them. None for a TPU, which computes a float32 product as several in bfloat16.
    links, link: number of a TPU's links to its neighbours, and bytes per second that each carries one way; None where
      the interconnect is not known.
    """

    flops: float
    memory: float
    bandwidth: float
    tf32: float | None = None
    float32: float | None = None
    links: int | None = None
    link: float | None = None

    def peak(self, precision: str | None) -> float:
        """Peak FLOP/s of products in bfloat16 (None) or in float32 at this `lax.Precision`, in lower case.

        XLA uses TF32 on GPUs for "default" and "high", and the float32 units for "highest"; on TPUs it takes PASSES
        (JAX, `lax.Precision`; XLA, `GetBlasComputationType`).
        """
        if precision is None:
            return self.flops
        if self.tf32 is None or self.float32 is None:
            return self.flops / PASSES[precision]
        return self.float32 if precision == "highest" else self.tf32


PASSES = {"default": 1, "high": 3, "highest": 6}
"""Number of bfloat16 products in a TPU's float32 product, by `lax.Precision`."""


CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1228e9),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 819e9, links=4, link=50e9),
    "TPU v5e": Chip(197e12, 16 * GIB, 819e9, links=4, link=50e9),
    "TPU v5": Chip(459e12, 95 * GIB, 2765e9, links=6, link=100e9),
    "TPU v5p": Chip(459e12, 95 * GIB, 2765e9, links=6, link=100e9),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1640e9, links=4, link=100e9),
    "TPU v6e": Chip(918e12, 32 * GIB, 1640e9, links=4, link=100e9),
    "H100 PCIe": Chip(756e12, 80e9, 2000e9, 378e12, 51e12),
    "H100 NVL": Chip(835e12, 94e9, 3900e9, 418e12, 60e12),
    "H100": Chip(989e12, 80e9, 3350e9, 495e12, 67e12),
    "H200 NVL": Chip(835e12, 141e9, 4800e9, 418e12, 60e12),
    "H200": Chip(989e12, 141e9, 4800e9, 495e12, 67e12),
    "A100": Chip(312e12, 40e9, 1555e9, 156e12, 19.5e12),
    "A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 156e12, 19.5e12),
    "A100 80GB PCIe": Chip(312e12, 80e9, 1935e9, 156e12, 19.5e12),
}
"""Peaks by whole words of the `device_kind`, from the makers' pages (cloud.google.com/tpu/docs/v4, v5e, v5p,
v6e; NVIDIA's data sheets of A100, H100 and H200; their tensor core figures are with sparsity, twice these). A TPU page
gives the bandwidth of all links of a chip in both directions together: 400, 1200 and 800 GB/s for v5e, v5p and v6e."""

# Generation in a target -> options of libtpu. v4 as on the machines: the two cores of a chip are one device.
_GENERATIONS = {"v4": {"chip_config_name": "megacore"}, "v5e": {}, "v5p": {}, "v6e": {}}

KNOWN = "tpu:v4:2x2x2, tpu:v5e:4x4, tpu:v5p:2x2x2, tpu:v6e:4x4, gpu, gpu:8, cpu, cpu:8"
"""Examples of targets, for messages."""


def chip(device_kind: str) -> Chip | None:
    """The entry of CHIPS with the longest name among the words of `device_kind`; None for an unknown device.

    None also for a part of a GPU (MIG), which has a fraction of the peaks in the data sheet.
    """
    words = re.split(r"[\s_]+", device_kind)
    if "MIG" in words:
        return None
    text = f" {' '.join(words)} "
    # "A100-SXM4-40GB" is an A100, "GH200" no H200.
    matches = [name for name in CHIPS if f" {name} " in text or f" {name}-" in text]
    return CHIPS[max(matches, key=len)] if matches else None


def memory_limit(device: jax.Device, peaks: Chip | None) -> tuple[float | None, str]:
    """Bytes that programs may take of the device, and where the figure comes from. peaks: its `chip`.

    A local GPU tells what its allocator may hand out; otherwise it is the data sheet's figure less HEADROOM. The TPU
    compiler accounts for its own share, so a TPU has the data sheet's figure.
    """
    stats = device.memory_stats() if device.platform == "gpu" else None
    if stats and stats.get("bytes_limit"):
        return float(stats["bytes_limit"]), "what the allocator may hand out"
    if peaks is None:
        return None, "not known"
    if device.platform == "gpu":
        return (1 - HEADROOM) * peaks.memory, f"data sheet, less {HEADROOM:.0%}"
    return peaks.memory, "data sheet"


def target_devices(target: str) -> list[jax.Device]:
    """Devices to compile for. Those of a TPU slice are descriptions only, so no TPU is needed.

    Call it before anything else uses JAX: it decides which devices JAX opens.

    target: `tpu:GENERATION:SLICE`, such as "tpu:v5e:4x4" (needs the package libtpu), or "gpu", "gpu:8", "cpu" or
      "cpu:8" for all or that many devices of this machine; CPU devices may be virtual.
    Raises ValueError for an unknown target, and when this machine cannot compile for it.
    """
    kind, *rest = target.split(":")
    if kind == "tpu" and len(rest) == 2 and rest[0] in _GENERATIONS:
        return _tpu_slice(target, *rest)
    if kind in ("gpu", "cpu") and (not rest or (len(rest) == 1 and rest[0].isdecimal() and int(rest[0]) > 0)):
        return _own_devices(kind, int(rest[0]) if rest else 0)
    raise ValueError(f"--target={target}: unknown; known are {KNOWN}, with any size of slice or number of devices")


def _tpu_slice(target: str, generation: str, size: str) -> list[jax.Device]:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # a TPU machine would be asked for its own slice
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several may compile at once, and beside a training run
    quiet = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": f"{generation}-8", "TPU_MIN_LOG_LEVEL": "3"}
    for name, value in (quiet | {"TPU_STDERR_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    host = (1, 1, 1) if size == "1x1" else (2, 2, 1)  # chips of a host
    options = {"chips_per_host_bounds": host} | _GENERATIONS[generation]
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation}:{size}", **options)
        return list(slice_.devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--target={target}: libtpu knows no such slice: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:
        raise ValueError(
            f"--target={target}: the TPU compiler is not installed ({error}); on Linux x86_64, make tpu-compiler"
        ) from None


def _own_devices(kind: str, wanted: int) -> list[jax.Device]:
    if kind == "cpu" and wanted:
        # When JAX has started already (in a notebook, a test), its devices are those there are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", wanted)
    try:
        devices = jax.devices(kind)
    except RuntimeError as error:
        raise ValueError(f"--target={kind}: JAX finds no {kind} on this machine ({error})") from None
    if wanted > len(devices):
        raise ValueError(f"--target={kind}:{wanted}: this machine has {len(devices)} {kind} devices")
    return devices[: wanted or None]
