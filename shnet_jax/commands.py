"""What the modes of main.py do, as functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from shnet_jax.evaluate.compare import comparison_table
from shnet_jax.evaluate.protocols import Results
from shnet_jax.evaluate.report import card_table, table, write_json
from shnet_jax.evaluate.split import make_comparison, make_evaluator, subject
from shnet_jax.experiment import Experiment, abstract_variables, assemble
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.train.checkpoint import CheckpointError, Checkpoints
from shnet_jax.train.loop import train_and_evaluate
from shnet_jax.train.workdir import differences, trained_config


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains in `workdir` (or continues) and prints the last validation result."""
    results = train_and_evaluate(config, workdir)
    if hosts.is_first():
        print(table({f"{config.name}, {results.card['split']}": results}))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model: its parts, variables, their step and the split that chose it ("none" for the last one)."""

    experiment: Experiment
    variables: dict[str, Any]
    step: int
    selected_on: str


def load(workdir: str | Path, config: ConfigDict) -> Loaded:
    """The checkpoint config.eval.checkpoint of a work folder, on the data set config.data.dir.

    Model, text tower and vocabulary are those of the run; raises ValueError, WorkdirError or CheckpointError when the
    given configuration or the data set does not fit them.
    """
    workdir = Path(workdir)
    trained = trained_config(workdir)
    if wrong := _model_differences(trained, config):
        raise ValueError(f"{workdir} was trained with another model than --config names:\n  " + "\n  ".join(wrong))
    # What an evaluation may choose; everything else comes from the run.
    trained.unlock()
    trained.data.dir = config.data.dir or trained.data.dir
    trained.eval, trained.parallel = config.eval, config.parallel
    trained.text.weights = ""  # the checkpoint has them
    experiment = assemble(trained)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.step(config.eval.checkpoint)
    if step is None:
        raise CheckpointError(f"{workdir}: no checkpoint in {checkpoints.folder}")
    like = abstract_variables(experiment)
    variables = checkpoints.restore_variables(
        step, like, averaged=trained.optim.ema > 0, on_host=config.eval.stages > 1
    )
    chosen = config.eval.checkpoint == "best" and checkpoints.best is not None
    checkpoints.close()
    return Loaded(experiment, variables, step, trained.data.val_split if chosen else "none")


def _model_differences(trained: ConfigDict, config: ConfigDict) -> list[str]:
    """Fields of the model in which the given configuration differs from the run (sizes filled in at training aside)."""
    filled = {"weights", "vocab_size", "layers", "width", "heads", "mlp_dim", "max_positions"}
    lines = differences(config.model.to_dict(), trained.model.to_dict(), "config.model")
    ours = {k: v for k, v in trained.text.to_dict().items() if k not in filled}
    theirs = {k: v for k, v in config.text.to_dict().items() if k not in filled}
    return lines + differences(theirs, ours, "config.text")


def evaluate_checkpoint(config: ConfigDict, workdir: str | Path) -> Results:
    """Evaluates the checkpoint config.eval.checkpoint of a work folder on config.eval.split."""
    loaded = load(workdir, config)
    split = config.eval.split
    mesh = make_mesh(config.parallel.devices)
    what = subject(loaded.experiment, split, loaded.step, loaded.selected_on, mesh.size)
    return make_evaluator(loaded.experiment, split, mesh)(loaded.variables, what)


def evaluate(config: ConfigDict, workdir: str | Path) -> None:
    """Evaluates a checkpoint; prints table and card, writes results_<data set>_<split>_<protocol>_<checkpoint>.json.

    With config.eval.two_stage candidates, exact and two-stage ranking beside each other.
    """
    loaded = load(workdir, config)
    split, mesh = config.eval.split, make_mesh(config.parallel.devices)
    what = subject(loaded.experiment, split, loaded.step, loaded.selected_on, mesh.size)
    compare = make_comparison(loaded.experiment, split, mesh, Path(workdir) / f"scores_{split}")
    found = compare(loaded.variables, what)
    card = next(iter(found.values())).card
    arms = {config.name if len(found) == 1 else f"{config.name}, {name}": results for name, results in found.items()}
    name = f"results_{card['dataset']}_{card['split']}_{card['protocol']}_{config.eval.checkpoint}.json"
    if hosts.is_first():
        write_json(Path(workdir) / name, arms)
        print(f"{table(arms)}\n{card_table(card)}")
        if len(found) > 1:
            print(f"\n{comparison_table(found)}")
