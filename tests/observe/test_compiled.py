"""Compiling: what does not fit, and memory by the compiler's account."""

import types

import jax
import numpy as np
import pytest

from shnet_jax.observe import compiled as program

FLOAT = 4


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 30.5G of 15.75G hbm.", 30.5, 15.75),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.25G) "
            "exceeds available HBM (15.75G).",
            17.25,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: no more", None, None),
    ],
)
def test_out_of_memory(message, needed, available):
    def fail():
        raise jax.errors.JaxRuntimeError(message)

    with pytest.raises(program.OutOfMemory, match="RESOURCE_EXHAUSTED") as caught:
        program.compile_lowered(types.SimpleNamespace(compile=fail))
    gib = [None if size is None else size * 2**30 for size in (needed, available)]
    assert [caught.value.needed, caught.value.available] == gib


def test_other_faults_of_the_compiler_pass():
    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        program.compile_lowered(types.SimpleNamespace(compile=fail))


def test_memory_of_a_donated_argument():
    shape = jax.ShapeDtypeStruct((256, 128), np.float32)
    kept = program.memory(jax.jit(lambda x: x + 1).lower(shape).compile())
    given = program.memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(shape).compile())
    size = 256 * 128 * FLOAT
    assert (kept.arguments, kept.outputs, kept.aliased) == (size, size, 0)
    assert (given.arguments, given.outputs, given.aliased) == (size, size, size)
    assert kept.peak - given.peak == size
