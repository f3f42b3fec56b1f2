"""Old place of `evaluator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from shnet_jax.evaluate.encode import check
from shnet_jax.evaluate.evaluator import Evaluator
from shnet_jax.evaluate.evaluator import provenance as subject
from shnet_jax.evaluate.protocols import Provenance, Results
from shnet_jax.experiment import Experiment

__all__ = ["check", "make_evaluator", "subject"]


def make_evaluator(experiment: Experiment, split: str, mesh: Mesh) -> Callable[[dict[str, Any], Provenance], Results]:
    """`Evaluator.run`."""
    evaluator = Evaluator(experiment, split, mesh)
    return lambda variables, subject: evaluator.run(variables, int(subject.checkpoint_step), subject.selected_on)
