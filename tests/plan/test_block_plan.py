"""The plan of a costly ranking against the ranking itself: blocks, pairs and bytes of a score with parameters."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest

from shnet_jax.evaluation.pair_scores import make_programs, pair_scorer, score_matrix
from shnet_jax.evaluation.ranking_methods import rerank
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.plan import block_plan
from shnet_jax.plan.block_plan import PairCost, measure_pairs, plan_blocks, plan_two_stage
from shnet_jax.plan.rank_plan import plan_ranking
from shnet_jax.types import Embedding
from tests.train import toy
from tests.train.test_score_params import Factor, Weighted

N, T, TILE = 30, 60, 7
PARAMS = {"weights": {"factor": np.linspace(-1, 1, 16, dtype=np.float32)}}


class Counted:
    """A scorer's programs, and how often they ran on how many pairs."""

    def __init__(self, scorer):
        self.calls, self.pairs, self._scorer = 0, 0, scorer

    def block(self, params, images, texts):
        self.calls += 1
        self.pairs += len(images.vector) * len(texts.vector)
        return self._scorer.block(params, images, texts)


@pytest.fixture(scope="module")
def cost():
    model = Weighted(toy.Image(16, 0.0), toy.Text(toy.Words(9, 4), 16), Factor())
    item = Embedding(jax.ShapeDtypeStruct((1, 16), np.float32))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    return PairCost(model, shapes | {"image": "of no account"}, (item, item), pair_seconds=0.5)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_blocks_are_those_that_are_scored(cost, devices):
    mesh, rng = data_mesh(jax.devices()[:devices]), np.random.default_rng(0)
    images, texts = (Embedding(rng.normal(size=(m, 16)).astype(np.float32)) for m in (N, T))
    scorer = pair_scorer(cost.model, make_programs(cost.model, mesh), PARAMS, mesh, TILE)
    counted = Counted(scorer)
    actual = score_matrix(images, texts, dataclasses.replace(scorer, block=counted.block))
    np.testing.assert_allclose(actual, (images.vector * PARAMS["weights"]["factor"]) @ texts.vector.T, atol=1e-5)
    plan = plan_blocks(N, T, cost, mesh, TILE)
    assert (plan.rounds, plan.pairs) == (counted.calls, counted.pairs) and plan.host_bytes == actual.nbytes
    assert plan.work.flops == 2 * 16 * plan.rounds * TILE * TILE and plan.seconds == 0.5 * plan.pairs / devices
    assert f"{plan.pairs:,} pairs scored, about" in str(plan)

    owner = np.arange(T) // 2
    pairs = rerank(images, texts, owner, 3, scorer).pairs
    first = plan_ranking(N, T, cost.items, mesh, TILE, RetrievalModel.score)
    staged = plan_two_stage(first, 3, cost, mesh, TILE)
    assert 0.5 * staged.pairs < pairs <= staged.pairs == 3 * (N + T)
    assert plan_two_stage(first, 1000, cost, mesh, TILE).pairs == N * T


def test_a_pair_is_timed(cost, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=iter([3.0, 5.0]).__next__)
    monkeypatch.setattr(block_plan, "time", clock)
    assert measure_pairs(cost, data_mesh(jax.devices()[:1])) == 2.0 / block_plan.SAMPLE**2
