"""What the modes of main.py do, as functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from shnet_jax.evaluate.protocols import Results, Subject
from shnet_jax.evaluate.report import card_table, table, write_json
from shnet_jax.evaluate.split import make_evaluator
from shnet_jax.experiment import Experiment, abstract_variables, assemble, differences, load_config
from shnet_jax.train.checkpoint import CheckpointError, Checkpoints
from shnet_jax.train.loop import make_mesh, train_and_evaluate

# What an evaluation may choose; everything else comes from the trained run.
CHOSEN_BY_EVALUATION = ("data.dir", "eval", "parallel")


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains in `workdir` (or continues) and prints the last validation result."""
    results = train_and_evaluate(config, workdir)
    print(table({f"{config.name}, {results.card['split']}": results}))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model: its parts, variables and where they come from."""

    experiment: Experiment
    variables: dict[str, Any]
    step: int


def load(workdir: str | Path, config: ConfigDict) -> Loaded:
    """The checkpoint config.eval.checkpoint of a work folder, on the data set config.data.dir.

    Model, text tower and vocabulary are those of the run; raises ValueError or CheckpointError when the given
    configuration or the data set does not fit them.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise CheckpointError(f"{workdir}: no config.json; not the work folder of a training run")
    trained = load_config(path)
    trained.unlock()
    for name in CHOSEN_BY_EVALUATION:
        section, _, field = name.partition(".")
        if field:
            trained[section][field] = config[section][field] or trained[section][field]
        else:
            trained[section] = config[section]
    wrong = _model_differences(trained, config)
    if wrong:
        raise ValueError(f"{workdir} was trained with another model than --config names:\n  " + "\n  ".join(wrong))
    vocabulary = next(workdir.glob("vocabulary.*"), None)
    if vocabulary is None:
        raise CheckpointError(f"{workdir}: no vocabulary file; was the folder copied whole?")
    trained.tokenizer.path = str(vocabulary)
    trained.text.weights = ""  # the checkpoint has them
    experiment = assemble(trained)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.step(config.eval.checkpoint)
    if step is None:
        raise CheckpointError(f"{workdir}: no checkpoint in {checkpoints.folder}")
    averaged = trained.optim.ema > 0
    variables = checkpoints.restore_variables(step, abstract_variables(experiment), averaged=averaged)
    checkpoints.close()
    return Loaded(experiment, variables, step)


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
    experiment, settings = loaded.experiment, loaded.experiment.config
    split = settings.eval.split
    subject = Subject(
        dataset=experiment.dataset.path.parent.name,
        split=split,
        checkpoint_step=loaded.step,
        parameters=f"running average (decay {settings.optim.ema})" if settings.optim.ema else "trained",
        dtype=settings.model.dtype,
        selected_on=settings.data.val_split if settings.eval.checkpoint == "best" else "none",
    )
    return make_evaluator(experiment, split, make_mesh(settings))(loaded.variables, subject)


def evaluate(config: ConfigDict, workdir: str | Path) -> None:
    """Evaluates a checkpoint; prints the table and the card, writes results_<data set>_<split>.json."""
    results = evaluate_checkpoint(config, workdir)
    if jax.process_index() == 0:
        arms = {config.name: results}
        write_json(Path(workdir) / f"results_{results.card['dataset']}_{results.card['split']}.json", arms)
        print(f"{table(arms)}\n{card_table(results.card)}")
