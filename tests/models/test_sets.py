"""The set head against a float64 copy of its equations, and what its elements must not depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.models.sets import MODES, SetHead

WIDTH, SIZE = 8, 3


erf = np.vectorize(math.erf)


def items(n=4, tokens=6):
    rng = np.random.default_rng(0)
    mask = np.arange(tokens) < np.array([[6], [4], [1], [6]])[:n]
    return [jnp.float32(rng.normal(size=s)) for s in ((n, WIDTH), (n, tokens, WIDTH))] + [jnp.asarray(mask)]


def head(mode, **changes):
    module = SetHead(**({"size": SIZE, "mode": mode, "depth": 2, "heads": 2} | changes))

    params = jax.jit(module.init)(jax.random.key(0), *items())["params"]
    # Norms that begin as the identity would hide a missing scale or bias.
    rng = np.random.default_rng(1)
    return module, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def softmax(x, axis):
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


def slots(p, tokens, mask, heads, depth):
    found, a = np.broadcast_to(p["slots"], (len(tokens), *p["slots"].shape)), p["attention"]
    size = WIDTH // heads
    for _ in range(depth):
        mixed = np.zeros_like(found)
        q, k, v = dense(norm(found, a["slot_norm"]), a["query"]), dense(tokens, a["key"]), dense(tokens, a["value"])
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = softmax(q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(size), axis=1) * mask[:, None]
            weights /= weights.sum(-1, keepdims=True) + 1e-7
            mixed[..., part] = weights @ v[..., part]
        found = found + dense(mixed, a["out"])
        hidden = dense(norm(found, a["mlp_norm"]), a["mlp"]["in"])
        found = found + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, a["mlp"]["out"])
        found = norm(found, a["norm"])
    return found


def merge(p, vector, tokens, mask):
    m = p["merge"]
    logits = np.einsum("nd,nkd->nk", dense(vector, m["query"]), dense(tokens, m["key"])) / np.sqrt(WIDTH)
    weights = softmax(np.where(mask, logits, -1e30), 1)[..., None] * softmax(dense(tokens, m["cluster"]), 2)
    weights = weights * mask[..., None]
    return np.einsum("nkm,nkd->nmd", weights / (weights.sum(1, keepdims=True) + 1e-7), tokens)


@pytest.mark.parametrize("mode", MODES)
def test_elements(mode):
    module, params = head(mode)
    vector, tokens, mask = items()

    @jax.jit
    def run(params, tokens, mask):
        return module.apply({"params": params}, vector, tokens, mask)

    found = run(params, tokens, mask)
    p, v, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, vector, tokens))
    x, m = norm(x, p["token_norm"]), np.asarray(mask)
    parts = slots(p, x, m, 2, 2) if mode == "slot" else merge(p, v, x, m)
    expected = norm(v, p["global_norm"])[:, None] + norm(parts, p["part_norm"])
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)

    # What masked tokens hold, how many there are and the order of the others say nothing.
    noise = jnp.where(mask[..., None], tokens, 7.0)
    longer = jnp.pad(noise, ((0, 0), (0, 3), (0, 0))), jnp.pad(mask, ((0, 0), (0, 3)))
    order = np.random.default_rng(1).permutation(9)
    other = run(params, longer[0][:, order], longer[1][:, order])
    np.testing.assert_allclose(other, found, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_an_item_without_tokens_has_finite_elements_and_gradients(mode):
    module, params = head(mode)
    vector, tokens, mask = items()

    def total(params, tokens):
        return jnp.sum(module.apply({"params": params}, vector, tokens, jnp.zeros_like(mask)) ** 3)

    grads = jax.jit(jax.grad(total, argnums=(0, 1)))(params, tokens)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "changes, message",
    [({"mode": "mean"}, "'mean'; choose"), ({"size": 0}, "at least 1 element"), ({"heads": 3}, "3 attention heads")],
)
def test_what_does_not_fit_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        head(**({"mode": "slot"} | changes))
