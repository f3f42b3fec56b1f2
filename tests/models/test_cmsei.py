"""CMSEI-style towers and score against the float64 oracle, and what must not matter: order, padding, blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from shnet_jax.models import cmsei
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.ops import graphs, interaction
from shnet_jax.ops.interaction import Interaction, interaction_scores
from shnet_jax.types import Embedding
from tests.models import cmsei_oracle as oracle
from tests.models.test_shnet import compiled, random_variables

DIM, K, L, N, T = 8, 5, 4, 3, 4
REGIONS = np.array([5, 3, 1])  # valid ones of each image
EDGES = [[(0, 1), (4, 2), (3, 3)], [(2, 0)], []]


def config(**options):
    c = get_config()
    c.model.update({"name": "cmsei", "dim": DIM})
    c.model.cmsei.update({"sharpness": (9.0, 4.0), "cross_sharpness": 3.0, "block": 4} | options)
    c.text.update({"tower": "bigru", "vocab_size": 7, "width": 6})
    return c


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    low = rng.random((N, K, 2)) * 0.4
    relations = np.full((N, 4, 3), -1, np.int32)
    for i, edges in enumerate(EDGES):
        for row, (a, b) in enumerate(edges):
            relations[i, row] = a, 1, b
    relations[1, 3] = 0, 2, 4  # names a masked region
    return {
        "regions": rng.normal(size=(N, K, 6)).astype(
            np.float32
        ),  # masked ones hold numbers, so that reading them shows
        "region_mask": np.arange(K) < REGIONS[:, None],
        "boxes": np.concatenate([low, low + 0.1 + 0.5 * rng.random((N, K, 2))], -1).astype(np.float32),
        "relations": relations,
        "tokens": rng.integers(1, 7, (T, L)).astype(np.int32),
        "token_mask": np.arange(L) < np.array([[4], [2], [1], [3]]),
    }


@functools.cache
def built(**options):
    model = cmsei.build(config(**options))
    variables = random_variables(model, batch())
    return model, variables, compiled(lambda v, b: model.apply(v, b, train=False))


def scored(model, variables, images, texts):
    return compiled(lambda *pair: model.apply(variables, *pair, method="score"))(images, texts)


def terms(images, texts, params):
    """The oracle's terms of all pairs, from the towers' own elements."""
    gates = (params.get("image_gates"), params.get("text_gates"))
    found = [
        [
            oracle.score(*(np.asarray(x, np.float64) for x in (v[m, :DIM], a, w[k, :DIM], b)), *gates)
            for w, k, b in zip(texts.elements, texts.mask, texts.vector, strict=True)
        ]
        for v, m, a in zip(images.elements, images.mask, images.vector, strict=True)
    ]
    return {name: np.array([[pair[name] for pair in row] for row in found]) for name in found[0][0]}


@pytest.mark.parametrize("heads", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_regions_equal_the_oracle(heads):
    _, variables, run = built(geometry_heads=heads, iou_threshold=0.25)
    images, _ = run(variables, batch())
    p = variables["params"]["image"]
    overlapping = 0
    for i, count in enumerate(REGIONS):
        boxes = batch()["boxes"][i, :count].astype(np.float64)
        spatial = oracle.spatial_graph(boxes, 0.25)
        overlapping += np.count_nonzero(spatial) - count
        weights = oracle.head_weights(boxes, p["geometry"]) if heads else None
        x = batch()["regions"][i, :count].astype(np.float64)
        regions, vector = oracle.encode_image(x, spatial, oracle.semantic_graph(count, EDGES[i]), p, weights)
        np.testing.assert_allclose(images.elements[i, :count, :DIM], regions, atol=2e-5)
        np.testing.assert_allclose(images.vector[i], vector, atol=2e-5)
    assert overlapping


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {"objects": 0.5, "words": 0.5, "os": 0.5, "wi": 0.5, "global": 1}),
        pytest.param(
            {"refine": False, "cross_weight": 0.25},
            {"objects": 0.5, "words": 0.5, "os": 0.25, "wi": 0.25, "global": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param({"attend": ("objects",), "global_weight": 0.0}, {"objects": 1, "os": 0.5}, marks=pytest.mark.slow),
        pytest.param({"attend": ("words",), "cross_weight": 0.0}, {"words": 1, "global": 1}, marks=pytest.mark.slow),
    ],
)
def test_the_score_equals_the_oracle(options, weights):
    model, variables, run = built(**options)
    images, texts = run(variables, batch())
    found = scored(model, variables, images, texts)
    expected = terms(images, texts, variables["params"])
    np.testing.assert_allclose(found, sum(w * expected[name] for name, w in weights.items()), atol=2e-5)
    assert np.ptp(found) > 0.1


def test_without_attention_the_score_is_the_dot_product():
    model, variables, run = built(attend=())
    assert model.score is RetrievalModel.score
    images, texts = run(variables, batch())
    assert images.elements is None and texts.elements is None
    with_elements = built()[2](built()[1], batch())[0]
    assert with_elements.elements.shape == (N, K, 3 * DIM)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "graph"), [(0, "relations"), (2, "relation_scores")])
def test_the_order_of_regions_changes_nothing(heads, graph):
    """With relations as triplets or as scores of pairs, and with learned weights of the geometry."""
    model, variables, run = built(geometry_heads=heads, iou_threshold=0.25)
    order = np.random.default_rng(1).permutation(K)
    place = np.append(np.argsort(order), -1)  # of each region in the new order; -1 stays padding
    moved = {name: batch()[name][:, order] for name in ("regions", "region_mask", "boxes")}
    relations = batch()["relations"].copy()
    relations[..., [0, 2]] = place[relations[..., [0, 2]]]
    scores = np.random.default_rng(4).random((N, K, K)).astype(np.float32)
    given = {
        "relations": (batch()["relations"], relations),
        "relation_scores": (scores, scores[:, order][:, :, order]),
    }[graph]
    changed = batch() | moved
    score = compiled(lambda *pair: model.apply(variables, *pair, method="score"))
    one, other, mixed = (
        score(*run(variables, b))
        for b in (batch() | {graph: given[0]}, changed | {graph: given[1]}, changed | {graph: given[0]})
    )
    np.testing.assert_allclose(other, one, atol=1e-5)
    assert np.abs(mixed - one).max() > 1e-3  # the graph of another order is another graph


def test_padding_never_matters():
    model, variables, run = built()
    rng = np.random.default_rng(2)
    changed = {name: np.array(value) for name, value in batch().items()}
    for field, mask in (("regions", "region_mask"), ("boxes", "region_mask"), ("tokens", "token_mask")):
        noise = rng.integers(1, 7, changed[field].shape).astype(changed[field].dtype)
        off = ~batch()[mask].reshape(*batch()[mask].shape, *[1] * (changed[field].ndim - 2))
        changed[field] = np.where(off, noise, changed[field])
    pairs = [run(variables, b) for b in (batch(), changed)]
    wide = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 3), (0, 0)][: x.ndim]), pairs[1][1].replace(vector=None))
    wide = wide.replace(vector=pairs[1][1].vector, elements=np.where(wide.mask[..., None], wide.elements, 7))
    scores = [scored(model, variables, *p) for p in (*pairs, (pairs[1][0], wide))]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-5)


def random_items(count, size, seed, dim=DIM):
    rng = np.random.default_rng(seed)
    vector = rng.normal(size=(count, dim))
    return Embedding(
        jnp.asarray(vector / np.linalg.norm(vector, axis=1, keepdims=True), jnp.float32),
        jnp.asarray(rng.normal(size=(count, size, 3 * dim)), jnp.float32),
        jnp.arange(size) < rng.integers(1, size + 1, (count, 1)),
    )


@pytest.mark.slow
def test_blocks_change_neither_scores_nor_gradients():
    images, texts = random_items(5, K, 0), random_items(7, L, 1)
    weights = np.random.default_rng(2).normal(size=(5, 7))

    def total(elements, block):
        found = interaction_scores(
            *(x.replace(elements=e) for x, e in zip((images, texts), elements, strict=True)), Interaction(block=block)
        )
        return jnp.sum(weights * found), found

    def run(block):
        graded = jax.value_and_grad(lambda elements: total(elements, block), has_aux=True)
        return compiled(graded)((images.elements, texts.elements))

    (_, wanted), gradients = run(35)
    for block in (1, 6):
        (_, found), ours = run(block)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        for one, other in zip(gradients, ours, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5)


def test_gradients_are_finite_where_nothing_agrees():
    images, texts = random_items(2, 3, 0), random_items(2, 3, 1)
    opposite = texts.replace(elements=-jnp.abs(texts.elements))
    images = images.replace(elements=jnp.abs(images.elements).at[0, 0].set(0.0))
    graded = jax.grad(lambda e: interaction_scores(images.replace(elements=e), opposite, Interaction()).sum())
    assert np.isfinite(compiled(graded)(images.elements)).all()


@pytest.mark.slow
def test_what_exists_at_once_is_a_block_and_no_tile():
    """By the compiler's account: [n, t, K, d] of the tile is never there, in neither pass."""
    n, size, dim, block = 128, 16, 64, 16
    items = [jax.eval_shape(lambda i=i: random_items(n, size, i, dim)) for i in range(2)]

    def loss(images, texts):
        return jnp.sum(jnp.square(interaction_scores(images, texts, Interaction(block=block))))

    def both(elements, images, texts):
        return jax.grad(lambda e: loss(*(x.replace(elements=y) for x, y in zip((images, texts), e, strict=True))))(
            elements
        )

    compiled = jax.jit(both).lower(tuple(x.elements for x in items), *items).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    tile, one_block, elements = n * n * size * dim * 4, block * size * dim * 4, n * size * 3 * dim * 4
    assert temporary < 40 * one_block + 6 * elements < tile / 2, (temporary, one_block, elements, tile)


def test_graphs_from_scores_follow_the_threshold_and_masks():
    scores = np.zeros((1, 3, 3), np.float32)
    scores[0, 0, 1], scores[0, 2, 1] = 0.6, 0.4
    graph = graphs.confident_graph(scores, 0.5)
    mask = np.array([[True, True, False]])
    expected = [[[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(graphs.normalised(graph, mask), expected)
    everyone = graphs.overlap_graph(np.zeros((1, 3, 4), np.float32), -1.0)
    np.testing.assert_allclose(graphs.normalised(everyone, np.ones((1, 3), bool)), np.full((1, 3, 3), 1 / 3))


@pytest.mark.slow
def test_without_relations_the_graph_is_the_identity():
    model, variables, run = built()
    bare = {name: value for name, value in batch().items() if name != "relations"}
    empty = bare | {"relations": np.full((N, 1, 3), -1, np.int32)}
    assert jax.tree.structure(random_variables(model, bare)) == jax.tree.structure(variables)
    one, other = (run(variables, b)[0].vector for b in (bare, empty))
    np.testing.assert_allclose(one, other, atol=1e-6)  # two programs
    assert np.abs(one - run(variables, batch())[0].vector).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attend": ("regions",)}, r"attend is \('regions',\); choose from objects, words"),
        ({"attend": ("words", "words")}, "each once"),
        ({"geometry_heads": 3}, "geometry_heads is 3"),
        ({"block": -1}, "block is -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        cmsei.build(config(**options))


def test_a_block_fits_the_device(monkeypatch):
    assert cmsei.build(config(block=0)).how.block == interaction.BLOCK_ON_CPU < interaction.BLOCK
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cmsei.build(config(block=0)).how.block == interaction.BLOCK
    assert cmsei.build(config(block=7)).how.block == 7
