"""A score that is a method with parameters: initialised, trained, evaluated; fields that a model can do without."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from shnet_jax.data.batches import gather
from shnet_jax.evaluation.evaluator import Evaluator, choose_ranking_methods, evaluate_embedded, provenance
from shnet_jax.evaluation.extra_metrics import read_extra_metrics
from shnet_jax.evaluation.report import comparison_table
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.losses import total
from shnet_jax.parallel.mapping import data_mesh, map_step, put_batch, replicate
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from shnet_jax.types import DATA
from tests.train import tiny, toy
from tests.train.toy import image_fields  # noqa: F401  # this file is the model of config.model.name = __name__


class Factor(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("factor", nn.initializers.constant(0.5), (16,))


class Weighted(toy.Toy):
    """The toy, whose vectors' channels the score weighs."""

    score_params = ("weights",)
    weights: nn.Module

    def score(self, images, texts):
        return self.weights(images.vector) @ texts.vector.T


def build(config):
    made = toy.build(config)
    return Weighted(made.image, made.text, Factor())


@pytest.fixture(scope="module")
def experiment():
    return assemble(tiny.config(model__name=__name__, model__dropout=0.0, eval__two_stage=1000, eval__tile=4))


@pytest.mark.slow
def test_the_score_takes_part_in_the_step(experiment):
    variables = init_variables(experiment, 0)
    assert variables["params"]["weights"]["factor"].shape == (16,)
    loss_params, total_loss = total.build(experiment.config.loss, 1)
    tx, rng = optax.sgd(0.1), np.random.default_rng(0)
    batch = {
        "image_index": np.arange(8, dtype=np.int32),
        "regions": rng.normal(size=(8, 8, 200)).astype(np.float32),
        "region_mask": np.ones((8, 8), bool),
        "tokens": rng.integers(1, 9, (8, 5)).astype(np.int32),
        "token_mask": np.ones((8, 5), bool),
    }
    mesh = data_mesh(jax.devices()[:2])
    step = make_step(experiment.model, total_loss, tx, prepare_batch=gather, axis_name=DATA)
    state = replicate(create_state(variables, loss_params, tx, ema=False, seed=0), mesh)
    state, metrics = map_step(step, mesh)(state, put_batch(batch, mesh), {})
    assert metrics["finite"] == 1
    assert np.abs(np.asarray(state.params["model"]["weights"]["factor"]) - 0.5).max() > 1e-4


def test_evaluation_scores_with_the_variables_given(experiment, tmp_path):
    variables = init_variables(experiment, 0)
    mesh = data_mesh(jax.devices()[:2])

    def compare(variables):
        embedded = Evaluator(experiment, "test", mesh).embed(variables, 0)
        extra = read_extra_metrics(experiment.dataset, "test", experiment.config.eval)
        methods = choose_ranking_methods(experiment, variables, mesh, embedded.provenance, tmp_path / "scores")
        rows = {method.name: dataclasses.replace(embedded, method=method) for method in methods}
        return {
            name: evaluate_embedded(row, extra, experiment.config.eval, mesh)["whole"] for name, row in rows.items()
        }

    found = compare(variables)
    assert list(found) == ["global vectors", "two-stage 1000", "exact"]
    assert found["exact"].metrics == found["two-stage 1000"].metrics
    assert found["exact"].card["pairs_scored"] == found["two-stage 1000"].card["pairs_scored"] == 10 * 50
    lines = str(comparison_table(found)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(found)
    assert "500" in lines[3] and lines[0].rstrip("| ").endswith("speed-up")
    assert list((tmp_path / "scores").glob("*/block_*.npy"))
    variables["params"]["weights"]["factor"] = -variables["params"]["weights"]["factor"]
    turned = compare(variables)
    assert turned["exact"].metrics != found["exact"].metrics
    assert turned["global vectors"].metrics == found["global vectors"].metrics
    trained = Evaluator(experiment, "test", mesh).run(variables, 0)
    assert trained.metrics == turned["exact"].metrics


def test_fields_that_a_data_set_lacks_are_said(caplog):
    changes = {"model__name": "cmsei", "data__dir": str(tiny.dataset())}
    with caplog.at_level("INFO"):
        whole = assemble(tiny.config(**changes))
    assert whole.fields == ("regions", "boxes", "relations") and whole.notes == "relations: as imported"

    def without(*names):
        path = tiny.write(f"without_{'_'.join(names)}", lambda r: {k: v for k, v in r.items() if k not in names})
        return tiny.config(**changes | {"data__dir": str(path)})

    caplog.clear()
    with caplog.at_level("INFO"):
        bare = assemble(without("relations"))
    assert bare.fields == ("regions", "boxes")
    said = "no relation_scores or relations: the semantic graph is the identity"
    assert said in caplog.text and provenance(bare, "val", 0, "none", 1).notes == said
    with pytest.raises(ValueError, match="no boxes"):
        assemble(without("relations", "boxes"))
