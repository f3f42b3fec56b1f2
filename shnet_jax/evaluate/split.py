"""Old place of `evaluator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from shnet_jax.evaluate.encode import check
from shnet_jax.evaluate.ensemble import Embedded
from shnet_jax.evaluate.evaluator import Evaluator, embedded_split, evaluate_embedded
from shnet_jax.evaluate.evaluator import choose_ranking_methods as ways_to_rank
from shnet_jax.evaluate.evaluator import make_ranking_methods as make_rankings
from shnet_jax.evaluate.evaluator import provenance as subject
from shnet_jax.evaluate.protocols import Provenance, Results
from shnet_jax.experiment import Experiment

__all__ = ["check", "embed_split", "embedded_split", "evaluate_embedded", "make_evaluator", "make_rankings", "subject"]
__all__ += ["ways_to_rank"]


def make_evaluator(experiment: Experiment, split: str, mesh: Mesh) -> Callable[[dict[str, Any], Provenance], Results]:
    """`Evaluator.run`."""
    evaluator = Evaluator(experiment, split, mesh)
    return lambda variables, subject: evaluator.run(variables, int(subject.checkpoint_step), subject.selected_on)


def embed_split(
    experiment: Experiment, variables: dict[str, Any], split: str, mesh: Mesh, subject: Provenance
) -> Embedded:
    """`Evaluator.embed`."""
    return Evaluator(experiment, split, mesh).embed(variables, int(subject.checkpoint_step), subject.selected_on)
