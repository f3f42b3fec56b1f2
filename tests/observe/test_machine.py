"""Which dtype a device is fast at."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from shnet_jax.observe import machine


@pytest.mark.parametrize(
    ("platform", "capability", "flags", "dtype", "why"),
    [
        ("tpu", None, "", "bfloat16", "a TPU"),
        ("gpu", "9.0", "", "bfloat16", "a GPU of compute capability 9.0"),
        ("gpu", "8.0", "", "bfloat16", "a GPU of compute capability 8.0"),
        ("gpu", "7.5", "amx_bf16", "float32", "a GPU of compute capability 7.5"),
        ("gpu", "10.0", "", "bfloat16", "a GPU of compute capability 10.0"),
        ("gpu", "gfx90a", "", "float32", "a GPU of compute capability gfx90a"),
        ("gpu", None, "", "float32", "a GPU of compute capability unknown"),
        ("cpu", None, "fpu amx_tile amx_bf16 avx512_bf16", "bfloat16", "a CPU with AMX and AVX512-BF16"),
        ("cpu", None, "fpu avx512_bf16", "bfloat16", "a CPU with AVX512-BF16"),
        ("cpu", None, "fpu avx2 avx512f", "float32", "a CPU without AMX or AVX512-BF16"),
        ("cpu", None, "", "float32", "a CPU without AMX or AVX512-BF16"),
    ],
)
def test_the_dtype_that_a_device_is_fast_at(platform, capability, flags, dtype, why, monkeypatch):
    monkeypatch.setattr(machine, "entry", lambda path, name: flags if name == "flags" else "")
    device = SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    assert machine.fast_dtype(device) == (dtype, why)


def test_this_machine():
    dtype, why = machine.fast_dtype(jax.devices("cpu")[0])
    assert dtype in ("float32", "bfloat16") and why.startswith("a CPU with")
