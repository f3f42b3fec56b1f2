"""Loading a trained model, and evaluating one or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.records import DataSet, open_dataset
from shnet_jax.evaluate.blocks import remove_folder
from shnet_jax.evaluate.bootstrap import load_queries, recall_intervals, save_queries
from shnet_jax.evaluate.compare import comparison_table
from shnet_jax.evaluate.ensemble import Embedded, combine, mean_score
from shnet_jax.evaluate.extra import Wanted, read_wanted
from shnet_jax.evaluate.protocols import Results
from shnet_jax.evaluate.report import card_table, extra_table, interval_table, table, to_json
from shnet_jax.evaluate.split import embed_split, evaluate_embedded, in_two_stages, subject, ways_to_rank
from shnet_jax.evaluate.zero_shot import NAME as ZERO_SHOT
from shnet_jax.evaluate.zero_shot import zero_shot
from shnet_jax.experiment import AUTO, Experiment, abstract_variables, assemble
from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.observe.files import write_text
from shnet_jax.observe.results_page import results_page
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.train.checkpoint import CheckpointError, Checkpoints
from shnet_jax.train.workdir import Difference, complete, differences, sole_job, trained_config
from shnet_jax.types import Score

TWO_STAGE_ENSEMBLE = "an ensemble is ranked exactly: set config.eval.two_stage to 0 and config.eval.exact to True"
EVALUATION_LOCK = ".lock_evaluation"
SCORES = "scores"  # in a work folder: blocks of a long ranking that is not finished


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model: its parts, variables, their step and the split that chose it ("none" for the last one)."""

    experiment: Experiment
    variables: dict[str, Any]
    step: int
    selected_on: str

    @cached_property
    def score(self) -> Score:
        """The model's score with what was trained of it; always the same function, as programs are kept by it."""
        return scorer(self.experiment.model, self.variables["params"])


def load(workdir: str | Path, config: ConfigDict, step: int | None = None) -> Loaded:
    """The checkpoint config.eval.checkpoint of a work folder, or that of `step`, on the data set config.data.dir.

    Model, text tower and vocabulary are those of the run; raises ValueError, WorkdirError or CheckpointError when the
    given configuration or the data set does not fit them.
    """
    workdir = Path(workdir)
    saved = trained_config(workdir, config)
    trained = complete(saved, config)
    younger = [
        name for name, value in config.model.items() if isinstance(value, ConfigDict) and name not in saved.model
    ]
    if wrong := _model_differences(trained, config, {"clip", *younger}):
        lines = "\n  ".join(map(str, wrong))
        raise ValueError(f"{workdir} was trained with another model than --config names:\n  {lines}")
    return _restore(workdir, trained, config, step)


def load_any(workdir: str | Path, config: ConfigDict) -> Loaded:
    """As `load`, whatever model the run is of: config gives the evaluation only."""
    workdir = Path(workdir)
    return _restore(workdir, complete(trained_config(workdir, config), config), config)


def _restore(workdir: Path, trained: ConfigDict, config: ConfigDict, step: int | None = None) -> Loaded:
    # What an evaluation may choose; everything else comes from the run.
    trained.unlock()
    trained.data.dir = config.data.dir or trained.data.dir
    trained.eval, trained.parallel = config.eval, config.parallel
    trained.text.weights = ""  # the checkpoint has them
    experiment = assemble(trained)
    checkpoints = Checkpoints(workdir)
    named = step is not None
    if not named:
        step = checkpoints.step(config.eval.checkpoint)
    if step is None or not (checkpoints.folder / str(step)).is_dir():
        which = "" if step is None else f"{step} "
        raise CheckpointError(f"{workdir}: no checkpoint {which}in {checkpoints.folder}")
    like = abstract_variables(experiment)
    variables = checkpoints.restore_variables(
        step, like, averaged=trained.optim.ema > 0, on_host=config.eval.stages > 1
    )
    chosen = checkpoints.best is not None and (step == checkpoints.best if named else config.eval.checkpoint == "best")
    checkpoints.close()
    return Loaded(experiment, variables, step, trained.data.val_split if chosen else "none")


def _model_differences(trained: ConfigDict, config: ConfigDict, aside: set[str]) -> list[Difference]:
    """Fields of the model in which the given configuration differs from the run (sizes filled in at training aside).

    aside: sections of config.model that say nothing about this run.
    """
    filled = {
        "weights",
        "vocab_size",
        "layers",
        "width",
        "heads",
        "mlp_dim",
        "max_positions",
        "projection",
        "activation",
    }
    theirs, ours = ({k: v for k, v in c.model.to_dict().items() if k not in aside} for c in (config, trained))
    found = differences(theirs, ours, "config.model")
    ours = {k: v for k, v in trained.text.to_dict().items() if k not in filled}
    theirs = {k: v for k, v in config.text.to_dict().items() if k not in filled}
    found += differences(theirs, ours, "config.text")
    return [one for one in found if one.ours != AUTO]  # what the run was trained in


def evaluate_checkpoint(config: ConfigDict, workdir: str | Path) -> Results:
    """Evaluates the checkpoint config.eval.checkpoint of a work folder on config.eval.split.

    By the first of config.eval.protocols, with the further numbers that config.eval asks for.
    """
    return evaluate_loaded([load(workdir, config)], config)


def evaluate_loaded(members: Sequence[Loaded], config: ConfigDict, name: str = "ensemble") -> Results:
    """As `evaluate_checkpoint`; several models together, as an ensemble of that name.

    In two stages where config.eval.exact is False; raises ValueError for an ensemble then.
    """
    if len(members) > 1 and not config.eval.exact:
        raise ValueError(TWO_STAGE_ENSEMBLE)
    mesh = make_mesh(config.parallel.devices)
    wanted = read_wanted(members[0].experiment.dataset, config.eval.split, config.eval)
    found = [_embed(member, config.eval.split, mesh) for member in members]
    together = found[0] if len(found) == 1 else combine(name, found)
    if not config.eval.exact:
        together = dataclasses.replace(together, way=in_two_stages(members[0].experiment, members[0].variables, mesh))
    one = _first_protocol(config.eval)
    return evaluate_embedded(together, wanted, one, mesh, intervals=False)[one.protocols[0]]


def _first_protocol(evaluation: ConfigDict) -> ConfigDict:
    return ConfigDict(evaluation.to_dict() | {"protocols": evaluation.protocols[:1]})


def evaluate_zero_shot(config: ConfigDict) -> Results | None:
    """The row of the dual encoder whose vectors the data set config.data.dir has; None when it has none."""
    mesh = make_mesh(config.parallel.devices)
    found = _zero_shot(open_dataset(config.data.dir), _first_protocol(config.eval), mesh)
    return next(iter(found.values()), None)


def _zero_shot(dataset: DataSet, evaluation: ConfigDict, mesh: Mesh) -> dict[str, Results]:
    """By protocol; {} for a data set without such vectors."""
    pretrained = zero_shot(dataset, evaluation.split)
    if pretrained is None:
        return {}
    return evaluate_embedded(pretrained, read_wanted(dataset, evaluation.split, evaluation), evaluation, mesh)


def _embed(loaded: Loaded, split: str, mesh: Mesh) -> Embedded:
    what = subject(loaded.experiment, split, loaded.step, loaded.selected_on, mesh.size)
    return embed_split(loaded.experiment, loaded.variables, split, mesh, what)


def evaluate(config: ConfigDict, workdir: str | Path) -> None:
    """Evaluates a checkpoint, or those of config.eval.ensemble one by one and together.

    Prints tables and card and writes them to results_<data set>_<split>_<protocols>_<checkpoint>.md, .html and .json in
    `workdir`, and the ranks of all queries to queries_<...>.npz, for config.eval.compare. A data set with the vectors
    of a pretrained dual encoder (`zero_shot`) gets a row for that too. One evaluation at a time writes to a folder,
    beside training that may go on there; another one gets FolderInUse.
    """
    with sole_job(Path(workdir), EVALUATION_LOCK):
        _evaluate(config, Path(workdir))


def _evaluate(config: ConfigDict, workdir: Path) -> None:
    evaluation = config.eval
    mesh = make_mesh(config.parallel.devices)
    other = load_queries(Path(evaluation.compare)) if evaluation.compare else None
    rows, dataset, wanted = _rows(config, workdir, mesh)
    found = {row.name: evaluate_embedded(row, wanted, evaluation, mesh) for row in rows}
    found[ZERO_SHOT] = _zero_shot(dataset, evaluation, mesh)
    several = len(evaluation.protocols) > 1
    arms = {f"{row}, {p}" if several else row: results for row, by in found.items() for p, results in by.items()}
    if not hosts.is_first():
        return
    last = found[rows[-1].name]
    ours = last[evaluation.protocols[0]]
    assert ours.queries is not None  # `evaluate_embedded` gives them
    gaps = {}
    if other is not None:
        gaps[f"{rows[-1].name} - {evaluation.compare}"] = recall_intervals([ours.queries], [other])
    dataset_name, protocols = dataset.path.parent.name, "+".join(evaluation.protocols)
    name = f"{dataset_name}_{evaluation.split}_{protocols}_{evaluation.checkpoint}"
    if evaluation.two_stage and not evaluation.exact:  # beside what an exact ranking found
        name += f"_two_stage_{evaluation.two_stage}"
    tables = [
        table(arms),
        comparison_table(arms) if evaluation.two_stage and not evaluation.ensemble else None,
        extra_table(arms),
        interval_table({n: arm.intervals for n, arm in arms.items()} | gaps),
    ]
    shown = [found for found in tables if found is not None]
    cards = [card_table(results.card, f"{rows[-1].name}, {protocol}") for protocol, results in last.items()]
    text = "\n".join(map(str, [*shown, *cards]))
    save_queries(workdir / f"queries_{name}.npz", ours.queries)
    write_text(workdir / f"results_{name}.json", to_json(arms, gaps))
    write_text(workdir / f"results_{name}.md", text)
    write_text(
        workdir / f"results_{name}.html",
        results_page(f"{config.name} on {dataset_name}, {evaluation.split}", shown, cards),
    )
    print(text)
    remove_folder(workdir / SCORES)


def _rows(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[list[Embedded], DataSet, Wanted]:
    """What is evaluated, the last one being what the command is about; data set and judgements of the first."""
    evaluation, runs = config.eval, config.eval.ensemble
    if runs and (len({*map(str, runs)}) < len(runs) or len(runs) < 2):
        raise ValueError(f"config.eval.ensemble is {tuple(runs)}; expected at least 2 different work folders")
    if runs and evaluation.two_stage:
        raise ValueError(TWO_STAGE_ENSEMBLE)
    if runs:  # mistakes are told before anything is encoded
        mean_score([RetrievalModel.score] * len(runs), evaluation.ensemble_weights)
    for run in runs:
        trained_config(Path(run), config)
    first = load_any(runs[0], config) if runs else load(workdir, config)
    dataset = first.experiment.dataset
    wanted = read_wanted(dataset, evaluation.split, evaluation)
    members = [_embed(first, evaluation.split, mesh)]
    if not runs:
        own, folder = dataclasses.replace(members[0], name=config.name), workdir / SCORES
        ways = ways_to_rank(first.experiment, first.variables, mesh, own.subject, folder)
        if len(ways) > 1:
            return [dataclasses.replace(own, name=f"{own.name}, {way.name}", way=way) for way in ways], dataset, wanted
        return [dataclasses.replace(own, way=ways[0]) if ways else own], dataset, wanted
    # One after another: only one model's parameters are on the devices.
    del first
    members += [_embed(load_any(run, config), evaluation.split, mesh) for run in runs[1:]]
    if len({member.name for member in members}) < len(members):
        members = [dataclasses.replace(m, name=f"{m.name} ({run})") for m, run in zip(members, runs, strict=True)]
    together = combine(f"ensemble of {len(members)}", members, evaluation.ensemble_weights)
    return [*members, together], dataset, wanted
