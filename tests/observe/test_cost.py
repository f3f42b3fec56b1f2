"""Operation counts and utilisation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.observe import cost
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA


def device(kind):
    return types.SimpleNamespace(platform="accelerator", device_kind=kind)


def test_matrix_product_is_counted_exactly():
    compiled = jax.jit(jnp.matmul).lower(np.ones((32, 16), np.float32), np.ones((16, 8), np.float32)).compile()
    assert cost.step_flops(compiled) == 2 * 32 * 16 * 8


def test_backend_that_does_not_show_its_program():
    assert cost.step_flops(types.SimpleNamespace(as_text=lambda: None)) is None


def test_the_fastest_dtype_sets_the_peak(monkeypatch):
    monkeypatch.setattr(cost, "measured_flops", lambda device, dtype: {"float32": 1e9, "bfloat16": 4e9}[dtype])
    for dtypes, peak in ((("float32", "float32"), 1e9), (("float32", "bfloat16"), 4e9)):
        assert cost.Utilisation(None, 1, dtypes)._peak == peak


@pytest.mark.parametrize(
    "kind, peak",  # of products in bfloat16
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200 NVL", 835e12),
        ("Imaginary 9000", None),
    ],
)
def test_peaks(kind, peak):
    assert cost.peak_flops([device(kind)] * 4, ["bfloat16"]) == (peak and 4 * peak)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12 / 6),  # six products in bfloat16
        ("NVIDIA H100 80GB HBM3", 67e12),
        ("NVIDIA A100-SXM4-80GB", 19.5e12),
        ("Imaginary 9000", None),
    ],
)
def test_peaks_in_float32(kind, peak):
    assert cost.peak_flops([device(kind)] * 4, ["float32", "float32"]) == (peak and 4 * peak)
    assert peak is None or cost.peak_flops([device(kind)], ["float32", "bfloat16"]) > 4 * peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_peak_is_that_of_the_fastest_product(dtype, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0]).__next__)
    monkeypatch.setattr(cost, "time", clock)
    assert cost.measured_flops(jax.devices()[0], dtype, size=8, repeats=3) == 2 * 8**3 / 2.0


@pytest.mark.parametrize("how", mapping.MAPPINGS)
def test_utilisation(monkeypatch, how):
    monkeypatch.setattr(cost, "measured_flops", lambda *_: 1e6)
    mesh = mapping.data_mesh(jax.devices()[:2])
    compiles = []

    def step(w, batch):
        compiles.append(batch.shape)
        return axis.psum((batch @ w).sum(0), DATA)

    run = mapping.map_step(step, mesh, how, donate_state=False)
    utilisation = cost.Utilisation(run, mesh.size, ["float32"])
    clock = types.SimpleNamespace(last=types.SimpleNamespace(seconds=0.5))
    w = np.ones((64, 64), np.float32)
    for rows in (16, 32, 16):  # batches of two lengths
        batch = mapping.put_batch(np.ones((rows, 64), np.float32), mesh, how)
        utilisation.count(w, batch)
        run(w, batch)
    products = 2 * (16 + 32 + 16) * 64 * 64
    actual = utilisation.report(clock)
    assert products <= actual["flops_per_second"] * 0.5 < 1.1 * products
    assert actual["hardware_utilisation"] == actual["flops_per_second"] / 1e6
    assert len(compiles) == 2  # one for each length, shared by the count and the step
    assert utilisation.report(clock) == {}  # nothing since
