"""First lines of a long command."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from shnet_jax.observe import banner


def test_devices_processes_and_work_folder():
    assert banner.banner("train", "runs/one") == "train: 8 x cpu, 1 process, work folder runs/one"


@pytest.mark.parametrize(("shape", "text"), [((3,), "3"), ((5, 300), "1.5 k"), ((2, 1000, 1700), "3.4 M")])
def test_parameters(shape, text):
    assert banner.parameter_count({"a": jnp.zeros(shape)}) == text


@pytest.mark.parametrize(
    ("devices", "vendor", "kind"),
    [
        (["nvidia0", "nvidiactl"], "0x10de", "GPU"),
        (["nvidiactl"], "0x10de", None),  # the driver is there, the card is not
        (["accel0"], "0x1ae0", "TPU"),
        (["vfio/0"], "0x1ae0", "TPU"),
        (["vfio/0"], "0x8086", None),  # a device that is passed to a virtual machine
        ([], "0x1ae0", None),
    ],
)
def test_an_accelerator_that_jax_does_not_use(devices, vendor, kind, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for path in (*(tmp_path / "dev" / name for name in devices), tmp_path / "sys/bus/pci/devices/0/vendor"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{vendor}\n")
    warning = banner.unused_accelerator(tmp_path)
    assert (warning is None) == (kind is None)
    if kind:
        assert f"has a {kind}" in warning and banner.INSTALL[kind] in warning
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        assert banner.unused_accelerator(tmp_path) is None
