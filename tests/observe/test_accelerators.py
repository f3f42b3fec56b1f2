"""Whether an extra for accelerators suits a machine: made-up drivers, device files and platforms."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shnet_jax.observe import accelerators
from shnet_jax.observe.accelerators import fault, main, nvidia_smi

LINUX = "Linux x86_64"


def machine(root, *devices, vendor=accelerators.GOOGLE):
    for path in (*(root / "dev" / name for name in devices), root / "sys/bus/pci/devices/0/vendor"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{vendor}\n")
    return root


@pytest.mark.parametrize(
    ("extra", "gpus", "message"),
    [
        ("cuda12", "525.60.13, 8.0\n525.60.13, 8.0\n", None),
        ("cuda13", "580.65.06, 9.0\n", None),
        ("cuda13", "1000.1, 12.0\n", None),
        ("cuda13", "550.54.15, 8.0\n", "needs driver 580 or newer .* found driver 550.*: choose EXTRAS=cuda12$"),
        ("cuda13", "580.65.06, 7.0\n", "capability 7.5 or more; .* capability 7.0: choose EXTRAS=cuda12$"),
        ("cuda12", "470.82.01, 7.0\n", "needs driver 525 or newer .*: update the driver, or install for the CPU"),
        ("cuda12", "580.65.06, 9.0\n470.82.01, 9.0\n", "found driver 470"),
        ("cuda12", None, "nvidia-smi shows none. Without a GPU: make setup; .* EXTRAS=cuda12 CHECK_MACHINE=$"),
        ("cuda12", "No devices were found\n", "nvidia-smi shows none"),
    ],
)
def test_cuda(extra, gpus, message, tmp_path):
    found = fault(extra, LINUX, lambda: gpus, tmp_path)
    assert found is None if message is None else re.search(message, found)


def test_cuda_elsewhere(tmp_path):
    assert "is for Linux on x86_64 or aarch64, this is Darwin arm64" in fault("cuda12", "Darwin arm64", lambda: None)
    assert fault("cuda12", "Linux aarch64", lambda: "570.1, 9.0") is None
    found = fault("cuda13", LINUX, lambda: None, machine(tmp_path, "accel0"))
    assert "this machine has a TPU: EXTRAS=tpu" in found


@pytest.mark.parametrize(
    ("system", "devices", "vendor", "message"),
    [
        (LINUX, ["accel0"], accelerators.GOOGLE, None),
        (LINUX, ["vfio/0"], accelerators.GOOGLE, None),
        (LINUX, ["vfio/0"], "0x8086", "neither /dev/accel"),
        (LINUX, [], accelerators.GOOGLE, "for plans without a TPU: make tpu-compiler"),
        ("Linux aarch64", ["accel0"], accelerators.GOOGLE, "this is Linux aarch64: make setup"),
    ],
)
def test_tpu(system, devices, vendor, message, tmp_path):
    found = fault("tpu", system, lambda: None, machine(tmp_path, *devices, vendor=vendor))
    assert found is None if message is None else message in found


def test_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(accelerators, "fault", lambda extra: "does not fit" if extra == "tpu" else None)
    assert main(["dev"]) == main(["dev", "cuda12"]) == 0 and not capsys.readouterr().err
    assert main(["dev", "tpu"]) == 1 and capsys.readouterr().err == "error: does not fit\n"
    assert main(["cuda12", "cuda13"]) == 1 and "choose one of cuda12, cuda13" in capsys.readouterr().err


def test_what_nvidia_smi_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi() is None
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --query-gpu=driver_version,compute_cap ] && echo "535.1, 8.9"\n')
    program.chmod(0o755)
    assert fault("cuda12", LINUX) is None and "cuda12" in fault("cuda13", LINUX)
    program.write_text("#!/bin/sh\necho broken; exit 9\n")
    assert nvidia_smi() is None


def test_it_needs_no_package(tmp_path):
    """`make setup` calls it before anything is installed."""
    path = Path(accelerators.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", path, "dev"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
