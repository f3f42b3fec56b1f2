"""Loading of a trained model from its work folder."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from shnet_jax.experiment import AUTO, Experiment, abstract_variables, assemble
from shnet_jax.models.contract import scorer
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.exported import is_exported, read_dataset, restore_exported
from shnet_jax.training.workdir import BLOCK, Difference, complete, differences, trained_config, younger_models
from shnet_jax.types import Score


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model: its parts, variables, their step and the split that chose it ("none" for the last one)."""

    experiment: Experiment
    variables: dict[str, Any]
    step: int
    selected_on: str

    @cached_property
    def score(self) -> Score:
        """The model's score with its trained parameters; always the same function, as programs are kept by it."""
        return scorer(self.experiment.model, self.variables["params"])


def load(workdir: str | Path, config: ConfigDict, step: int | None = None) -> Loaded:
    """The checkpoint config.eval.checkpoint of a work folder, or that of `step`, on the data set config.data.dir.

    Model, text tower and vocabulary are those of the run; raises ValueError, WorkdirError or CheckpointError when the
    given configuration or the data set does not fit them.
    """
    workdir = Path(workdir)
    saved = trained_config(workdir, config)
    trained = complete(saved, config)
    aside = {"clip"} | younger_models(saved, config) | _sections_of_others(trained)
    if wrong := _model_differences(trained, config, aside):
        lines = "\n  ".join(map(str, wrong))
        raise ValueError(f"{workdir} was trained with another model than --config names:\n  {lines}")
    return _restore(workdir, trained, config, step)


def load_any(workdir: str | Path, config: ConfigDict) -> Loaded:
    """Loads a run of any model, as `load`; config gives the evaluation settings only."""
    workdir = Path(workdir)
    return _restore(workdir, complete(trained_config(workdir, config), config), config)


def _restore(workdir: Path, trained: ConfigDict, config: ConfigDict, step: int | None = None) -> Loaded:
    # What an evaluation may choose; everything else comes from the run.
    trained.unlock()
    trained.data.dir = config.data.dir or trained.data.dir
    trained.eval, trained.parallel = config.eval, config.parallel
    trained.text.weights = ""  # the checkpoint has them
    if is_exported(workdir):
        if step is not None:
            raise CheckpointError(f"{workdir} is an exported model, which has no checkpoint {step}")
        experiment = assemble(trained, read_dataset(workdir, trained))
        return Loaded(experiment, *restore_exported(workdir, experiment), "none")
    experiment = assemble(trained)
    checkpoints = Checkpoints(workdir)
    named = step is not None
    if not named:
        step = checkpoints.step(config.eval.checkpoint)
    if step is None or not (checkpoints.folder / str(step)).is_dir():
        which = "" if step is None else f"{step} "
        raise CheckpointError(f"{workdir}: no checkpoint {which}in {checkpoints.folder}")
    like = abstract_variables(experiment)
    in_parts = config.eval.stages > 1 or config.parallel.model > 1  # a device may not hold them whole
    variables = checkpoints.restore_variables(step, like, averaged=trained.optim.ema > 0, on_host=in_parts)
    chosen = checkpoints.best is not None and (step == checkpoints.best if named else config.eval.checkpoint == "best")
    checkpoints.close()
    return Loaded(experiment, variables, step, trained.data.val_split if chosen else "none")


def _sections_of_others(config: ConfigDict) -> set[str]:
    """Sections of config.model that the model does not read; a model outside this package may read any."""
    model = config.model
    if "." in model.name:
        return set()
    return {name for name, value in model.items() if isinstance(value, ConfigDict) and name != model.name}


def _model_differences(trained: ConfigDict, config: ConfigDict, aside: set[str]) -> list[Difference]:
    """Fields of the model in which the given configuration differs from the run (sizes filled in at training aside).

    aside: sections of config.model that say nothing about this run.
    """
    filled = {"weights", "vocab_size", "layers", "width", "heads", "mlp_dim"}
    filled |= {"max_positions", "projection", "activation"}
    theirs, ours = ({k: v for k, v in c.model.to_dict().items() if k not in aside} for c in (config, trained))
    wrong = differences(theirs, ours, "config.model")
    ours = {k: v for k, v in trained.text.to_dict().items() if k not in filled}
    theirs = {k: v for k, v in config.text.to_dict().items() if k not in filled}
    wrong += differences(theirs, ours, "config.text")
    return [one for one in wrong if one.ours != AUTO and one.name != BLOCK]  # AUTO: what the run was trained in
