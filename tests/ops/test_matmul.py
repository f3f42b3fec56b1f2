import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from shnet_jax.ops.matmul import einsum, matmul

# Below and above what XLA on CPU treats as small; batched, several summed letters, any order of results.
PRODUCTS = (
    ("ri,io->ro", (5, 7), (7, 3)),
    ("ri,io->or", (200, 200), (200, 7)),
    ("nd,td->nt", (40, 64), (90, 64)),
    ("ndk,td->ntk", (7, 64, 36), (7, 64)),
    ("nkd,tld->ntkl", (3, 36, 64), (4, 12, 64)),
    ("efa,fce->ca", (12, 12, 36), (12, 64, 12)),
    ("tqhd,tkhd->thqk", (16, 32, 4, 24), (16, 32, 4, 24)),
    ("tqhd,thqk->tkhd", (16, 32, 4, 24), (16, 4, 32, 32)),
)
every_product = pytest.mark.parametrize(("equation", "left", "right"), PRODUCTS)


def operands(left, right):
    rng = np.random.default_rng(0)
    return rng.normal(size=left).astype(np.float32), rng.normal(size=right).astype(np.float32)


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


def outputs_and_gradients(equation, a, b, dtype):
    """Result, its cotangent (not exact in bfloat16) and both gradients, compiled with other work around."""

    def run(a, b):
        out = einsum(equation, a, b, dtype)
        return jnp.sum(jnp.sin(1.3 * out) / 1.3), (out, jnp.cos(1.3 * out))

    (_, (out, cotangent)), gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(a, b)
    assert all(x.dtype == jnp.float32 for x in (out, *gradients))
    return out, cotangent, gradients


def expected_gradients(equation, cotangent, a, b):
    operands, out = equation.split("->")
    first, second = operands.split(",")
    return np.einsum(f"{out},{second}->{first}", cotangent, b), np.einsum(f"{out},{first}->{second}", cotangent, a)


@every_product
def test_float32(equation, left, right):
    a, b = operands(left, right)
    out, cotangent, gradients = outputs_and_gradients(equation, a, b, "float32")
    a, b, cotangent = (np.asarray(x, np.float64) for x in (a, b, cotangent))
    np.testing.assert_allclose(out, np.einsum(equation, a, b), atol=2e-4)
    for ours, expected in zip(gradients, expected_gradients(equation, cotangent, a, b), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-4)


@every_product
def test_bfloat16_rounds_operands_and_nothing_else(equation, left, right):
    a, b = operands(left, right)
    out, cotangent, gradients = outputs_and_gradients(equation, a, b, "bfloat16")
    a, b, cotangent = rounded(a), rounded(b), rounded(cotangent)
    np.testing.assert_allclose(out, np.einsum(equation, a, b), atol=2e-4)
    for ours, expected in zip(gradients, expected_gradients(equation, cotangent, a, b), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_keeps_leading_axes(dtype):
    x, w = operands((2, 3, 5), (5, 4))
    np.testing.assert_allclose(matmul(x, w, dtype), x @ w, atol=0.1)
    assert matmul(x[0, 0], w, dtype).shape == (4,)
    assert matmul(jnp.zeros((0, 3, 5)), w, dtype).shape == (0, 3, 4)


def test_gradients_have_the_dtypes_of_the_operands():
    x, w = operands((6, 5), (5, 4))
    x = jnp.asarray(x, jnp.bfloat16)
    to_x, to_w = jax.grad(lambda x, w: jnp.sum(matmul(x, w, "bfloat16")), argnums=(0, 1))(x, w)
    assert (to_x.dtype, to_w.dtype) == (jnp.bfloat16, jnp.float32)


def test_bfloat16_under_vmap_scan_and_shard_map():
    x, w = operands((8, 40, 30), (30, 20))
    expected = np.einsum("nri,io->nor", rounded(x), rounded(w))

    def one(x):
        return matmul(x, w, "bfloat16").T

    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x), expected, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda x: jax.lax.map(one, x))(x), expected, atol=1e-4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda x: jax.vmap(one)(x), mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    np.testing.assert_allclose(jax.jit(mapped)(x), expected, atol=1e-4)


@pytest.mark.parametrize("equation", ["ij,jk", "ij->i", "ii,ij->j", "...i,ij->...j", "ij,k->k", "ijk,kl->jl"])
def test_other_equations_are_refused(equation):
    a, b = operands((2, 2), (2, 2))
    with pytest.raises(ValueError, match="plain product"):
        einsum(equation, a, b, "float32")


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32 or bfloat16, not float16"):
        matmul(*operands((2, 2), (2, 2)), "float16")
