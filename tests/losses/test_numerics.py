"""Inputs at the edge: every loss gives the value of float64 and a finite gradient for them, and the same in tiles.

Values and gradients of all losses come from one program for each strategy and batch size.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax import registry
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Array, Context, Embedding, Keys, Pairs, Queue
from tests.losses import set_oracle

PAIRS, DIM, SIZE, CLASSES = 4, 5, 2, 6
BOUND = 0.02
"""Relative error; below it lies what float32 loses of exponents near 1e6."""

HINGE = {"margin": 0.2, "warmup_steps": 0, "reduction": "mean", "mask_same_image": True}
INFONCE = {"temperature": 0.07, "learn_temperature": True, "mask_same_image": True}
UTO = {"scale": 90.0, "offset": 0.5, "batch_weight": 20.0, "mask_same_image": True}
ASM = {"margin": 0.2, "sign": -1, "scale": 1.0, "of": "score"}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "triplet": ("triplet", HINGE),
    "triplet, every negative": ("triplet", HINGE | {"warmup_steps": 9}),
    "triplet, soft": ("triplet", HINGE | {"softness": 0.05}),
    "global_triplet": ("global_triplet", HINGE),
    "infonce": ("infonce", INFONCE),
    "infonce, fixed": ("infonce", INFONCE | {"temperature": 0.001, "learn_temperature": False}),
    "sigmoid": ("sigmoid", {"scale": 10.0, "bias": -10.0, "mask_same_image": True}),
    "uto": ("uto", UTO),
    "sdm": ("sdm", {"temperature": 0.02}),
    "identity": ("identity", {"classes": CLASSES, "dim": DIM}),
    "asm": ("asm", ASM),
    "asm, sets": ("asm", ASM | {"of": "set"}),
    "diversity": ("diversity", {"sharpness": 2.0, "gamma": 0.0}),
}
QUEUED = ("triplet", "triplet, soft", "infonce", "uto")


def score(images: Embedding, texts: Embedding) -> Array:
    """Of sets: beside the dot product the mean product of valid elements, 0 where there is none."""
    found = RetrievalModel.score(images, texts)
    if images.elements is None or texts.elements is None:
        return found
    sums = [jnp.einsum("nmd,nm->nd", x.elements, x.mask.astype(jnp.float32)) for x in (images, texts)]
    return found + sums[0] @ sums[1].T / SIZE**2


@functools.cache
def program(strategy: str, queued: bool):
    """(images, texts, ids, queue) -> {loss: ({name: value}, gradients by vectors, elements and what it learns)}."""

    def both(images: Embedding, texts: Embedding, ids: Array, queue: Queue | None):
        found = {}
        for name, (module, options) in LOSSES.items():
            if (queued and name not in QUEUED) or (len(ids) == 1 and "triplet" in name):
                continue  # a triplet loss refuses a single pair (test_triplet.py)
            sets = not queued
            fixed = images.mask, texts.mask

            def value(inputs, learned, module=module, options=options, fixed=fixed, sets=sets):
                sides = [
                    Embedding(v, e if sets else None, m if sets else None)
                    for (v, e), m in zip(inputs, fixed, strict=True)
                ]
                keys = None if queue is None else Keys(*sides, queue, queue)
                ctx = Context(jnp.int32(0), learned, score, None, Pairs(strategy, 3), keys)
                out = registry.loss(module).loss(*sides, ids, ctx, **options)
                return sum(v for k, v in out.items() if k.endswith("_loss")), out

            learned = getattr(registry.loss(module), "init_params", lambda **_: {})(**options)
            inputs = [(x.vector, x.elements) for x in (images, texts)]
            gradients, out = jax.grad(value, argnums=(0, 1), has_aux=True)(inputs, learned)
            found[name] = out, gradients
        return found

    return jax.jit(both)


def run(
    strategy: str, images: np.ndarray, texts: np.ndarray, ids: np.ndarray, masked: bool, queue: Queue | None = None
):
    """Vectors [B, d]; each item's elements are its vector, in unit length and opposite; masked: none is valid."""

    def side(x: np.ndarray) -> Embedding:
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)
        elements = np.stack([unit, -unit], axis=1)
        return Embedding(jnp.float32(x), jnp.float32(elements), jnp.full(elements.shape[:2], not masked))

    return jax.device_get(program(strategy, queue is not None)(side(images), side(texts), jnp.asarray(ids), queue))


@pytest.mark.parametrize("name", ["infonce", "sigmoid", "sigmoid, by pairs", "diversity"])
def test_batches_whose_entries_exceed_int32(name):
    """A loss by the entries of the matrix is divided by their number; nothing is computed here."""
    by_pairs = {"sigmoid, by pairs": ("sigmoid", LOSSES["sigmoid"][1] | {"reduction": "pairs"})}
    module, options = (LOSSES | by_pairs)[name]
    pairs = 2**16
    learned = getattr(registry.loss(module), "init_params", lambda **_: {})(**options)
    side = jax.eval_shape(
        lambda: Embedding(jnp.zeros((pairs, DIM)), jnp.zeros((pairs, 1, DIM)), jnp.ones((pairs, 1), bool))
    )

    def value(images: Embedding, texts: Embedding, ids: Array) -> dict[str, Array]:
        ctx = Context(jnp.int32(0), learned, RetrievalModel.score, None, Pairs("streamed", 4096))
        return registry.loss(module).loss(images, texts, ids, ctx, **options)

    found = jax.eval_shape(value, side, side, jax.ShapeDtypeStruct((pairs,), jnp.int32))
    assert all(x.shape == () and x.dtype == jnp.float32 for x in found.values())


def cases() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, bool]]:
    """(images, texts, ids, masked) by name."""
    ids, one = np.arange(PAIRS, dtype=np.int32), np.eye(PAIRS, DIM)
    rng = np.random.default_rng(0)
    usual = rng.normal(size=(2, PAIRS, DIM)) / np.sqrt(DIM)
    return {
        "scores of 1e4": (100 * one, 100 * one, ids, False),
        "scores of 1e4, all wrong": (100 * one, 100 * one[::-1], ids, False),
        "scores of -1e4": (100 * one, -100 * one, ids, False),
        "scores of 1e4, random": (*(100 * usual), ids, False),
        "all equal": (np.ones((PAIRS, DIM)) / np.sqrt(DIM), np.ones((PAIRS, DIM)) / np.sqrt(DIM), ids, False),
        "zero vectors": (np.zeros((PAIRS, DIM)), np.zeros((PAIRS, DIM)), ids, False),
        "a zero vector": (np.where(ids[:, None] == 1, 0, usual[0]), usual[1], ids, False),
        "no negatives": (*usual, np.zeros_like(ids), False),
        "one query without negatives": (*usual, np.array([2, 2, 2, 5], np.int32), False),
        "no valid elements": (*usual, ids, True),
        "one pair": (usual[0, :1], usual[1, :1], ids[:1], False),
    }


CASES = cases()


def logsumexp(x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[B], -inf for a row of which nothing counts."""
    return np.logaddexp.reduce(np.where(where, x, -np.inf), axis=1)


def expected(images: np.ndarray, texts: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """The losses in float64, from their definitions, in the form that does not overflow."""
    scores = images @ texts.T
    own, size, wrong = np.diag(scores), len(ids), ids[:, None] != ids
    first = np.eye(size, dtype=bool)
    found: dict[str, float] = dict.fromkeys(("triplet", "triplet, every negative", "triplet, soft"), 0.0)
    found |= {"infonce": 0.0, "infonce, fixed": 0.0, "uto": -20 * np.log1p(np.maximum(own, 0)).mean(), "sdm": 0.0}
    for s in (scores, scores.T):
        hardest = np.where(wrong, s, -np.inf).max(axis=1)
        found["triplet"] += np.maximum(0.2 + hardest - own, 0).mean()
        found["triplet, every negative"] += np.maximum(0.2 + np.where(wrong, s, -np.inf) - own[:, None], 0).sum() / size
        found["triplet, soft"] += np.maximum(0.2 + 0.05 * logsumexp(s / 0.05, wrong) - own, 0).mean()
        for name, scale in (("infonce", 1 / 0.07), ("infonce, fixed", 1000.0)):
            found[name] += (logsumexp(scale * s, wrong | first) - scale * own).mean() / 2
        found["uto"] += 20 * (np.logaddexp(0, logsumexp(90 * (s - 0.5), wrong)) / 90).mean()
        log_p = s / 0.02 - logsumexp(s / 0.02, ~np.zeros_like(wrong))[:, None]
        q = ~wrong / (~wrong).sum(axis=1, keepdims=True)
        found["sdm"] += (np.exp(log_p) * (log_p - np.log(q + 1e-8))).sum() / size
    logits = 10 * scores - 10
    found["sigmoid"] = (np.logaddexp(0, logits) * wrong + np.logaddexp(0, -logits) * first).sum() / size
    found["asm"] = set_oracle.asm(scores, (images, texts), ids, margin=0.2, sign=-1, scale=1.0)
    kernel = np.asarray(registry.loss("identity").init_params(classes=CLASSES, dim=DIM)["kernel"], np.float64)
    found["identity"] = set_oracle.identity(images, texts, ids, kernel, 0.0)
    return found | {"global_triplet": found["triplet"]}


def finite(found: Any) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def agree(dense: dict[str, Any], tiled: dict[str, Any], large: bool) -> None:
    for name in dense:
        assert finite(tiled[name]), f"{name}: {tiled[name][0]}"
        if name == "sdm" and large:  # cosines of 1e4 are none: where exponents near 1e6 cancel, only the value is left
            continue
        for one, other in zip(jax.tree.leaves(dense[name]), jax.tree.leaves(tiled[name]), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (c in ("one pair", "scores of 1e4"))) for c in CASES]
)
def test_values_are_those_of_float64_and_gradients_finite(case):
    images, texts, ids, masked = CASES[case]
    wanted = expected(images, texts, ids)
    for name, (out, gradients) in run("gathered", images, texts, ids, masked).items():
        assert finite((out, gradients)), f"{name}: {out}"
        value = sum(v for k, v in out.items() if k.endswith("_loss"))
        if name in wanted:
            np.testing.assert_allclose(value, wanted[name], rtol=BOUND, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tiles_agree_at_the_edge(case):
    agree(*(run(strategy, *CASES[case]) for strategy in ("gathered", "streamed")), large="1e4" in case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scores of 1e4", "all equal", "zero vectors", "no negatives"])
@pytest.mark.parametrize("alike", [True, False])
def test_queues_at_the_edge(case, alike):
    """Queues of zero vectors, of the same image alone (no negatives of it) or of others alone."""
    queue = Queue(jnp.zeros((7, DIM)), jnp.full((7,), 0 if alike else -1, jnp.int32), jnp.int32(0))
    dense, tiled = (run(strategy, *CASES[case], queue) for strategy in ("gathered", "streamed"))
    assert finite(dense)
    agree(dense, tiled, large="1e4" in case)
