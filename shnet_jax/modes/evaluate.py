"""--mode=eval: evaluates checkpoints, one by one and as an ensemble; also for the modes cross and study."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.records import DataSet, open_dataset
from shnet_jax.evaluation.bootstrap import Interval, load_queries, recall_intervals, save_queries
from shnet_jax.evaluation.ensemble import Embedded, combine, mean_score
from shnet_jax.evaluation.evaluator import Evaluator, choose_ranking_methods, evaluate_embedded
from shnet_jax.evaluation.extra_metrics import ExtraMetrics, read_extra_metrics
from shnet_jax.evaluation.pair_scores import remove_folder
from shnet_jax.evaluation.prefix import check_sizes, prefix
from shnet_jax.evaluation.protocols import Results
from shnet_jax.evaluation.report import card_table, comparison_table, extra_table, interval_table, table, to_json
from shnet_jax.evaluation.zero_shot import NAME as ZERO_SHOT
from shnet_jax.evaluation.zero_shot import zero_shot
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.files import write_text
from shnet_jax.observe.results_page import results_page
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.training.load import Loaded, load, load_any
from shnet_jax.training.workdir import sole_job, trained_config

TWO_STAGE_ENSEMBLE = "an ensemble is ranked exactly: set config.eval.two_stage to 0 and config.eval.exact to True"
EVALUATION_LOCK = ".lock_evaluation"
SCORES = "scores"  # in a work folder: blocks of a long ranking that is not finished


def evaluate(config: ConfigDict, workdir: str | Path, card: bool = False) -> None:
    """Evaluates a checkpoint, or those of config.eval.ensemble one by one and together.

    Prints tables, and the protocol cards with `card`. Writes both to results_<data set>_<split>_<protocols>_
    <checkpoint>.md, .html and .json in `workdir`, and the ranks of all queries to queries_<...>.npz, for
    config.eval.compare. A data set with the vectors of a pretrained dual encoder (`zero_shot`) gets a row for that too.
    One evaluation at a time writes to a folder, beside training that may go on there; another one gets FolderInUse.
    """
    with sole_job(Path(workdir), EVALUATION_LOCK):
        _evaluate(config, Path(workdir), card)


def evaluate_checkpoint(config: ConfigDict, workdir: str | Path) -> Results:
    """Evaluates the checkpoint config.eval.checkpoint of a work folder on config.eval.split.

    By the first of config.eval.protocols, with the extra metrics that config.eval asks for.
    """
    return evaluate_loaded([load(workdir, config)], config)


def evaluate_loaded(members: Sequence[Loaded], config: ConfigDict, name: str = "ensemble") -> Results:
    """Evaluates loaded models as `evaluate_checkpoint` does; several together form an ensemble of that name.

    In two stages where config.eval.exact is False; raises ValueError for an ensemble then.
    """
    if len(members) > 1 and not config.eval.exact:
        raise ValueError(TWO_STAGE_ENSEMBLE)
    mesh = make_mesh(config.parallel.devices)
    extra = read_extra_metrics(members[0].experiment.dataset, config.eval.split, config.eval)
    evaluators = [Evaluator(member.experiment, config.eval.split, mesh) for member in members]
    galleries = [_embed(evaluator, member) for evaluator, member in zip(evaluators, members, strict=True)]
    together = galleries[0] if len(galleries) == 1 else combine(name, galleries)
    if not config.eval.exact:
        together = dataclasses.replace(together, method=evaluators[0].methods.rerank(members[0].variables))
    first = _first_protocol(config.eval)
    return evaluate_embedded(together, extra, first, mesh, intervals=False)[first.protocols[0]]


def evaluate_zero_shot(config: ConfigDict) -> Results | None:
    """The row of the dual encoder whose vectors the data set config.data.dir has; None when it has none."""
    mesh = make_mesh(config.parallel.devices)
    by_protocol = _zero_shot(open_dataset(config.data.dir), _first_protocol(config.eval), mesh)
    return next(iter(by_protocol.values()), None)


def _first_protocol(evaluation: ConfigDict) -> ConfigDict:
    return ConfigDict(evaluation.to_dict() | {"protocols": evaluation.protocols[:1]})


def _zero_shot(dataset: DataSet, evaluation: ConfigDict, mesh: Mesh) -> dict[str, Results]:
    """Results by protocol; {} for a data set without such vectors."""
    pretrained = zero_shot(dataset, evaluation.split)
    if pretrained is None:
        return {}
    extra = read_extra_metrics(dataset, evaluation.split, evaluation)
    return evaluate_embedded(pretrained, extra, evaluation, mesh)


def _embed(evaluator: Evaluator, loaded: Loaded) -> Embedded:
    return evaluator.embed(loaded.variables, loaded.step, loaded.selected_on)


def _evaluate(config: ConfigDict, workdir: Path, card: bool) -> None:
    evaluation = config.eval
    mesh = make_mesh(config.parallel.devices)
    other = load_queries(Path(evaluation.compare)) if evaluation.compare else None
    rows, dataset, extra = _rows(config, workdir, mesh)
    by_row = {row.name: evaluate_embedded(row, extra, evaluation, mesh) for row in rows}
    by_row[ZERO_SHOT] = _zero_shot(dataset, evaluation, mesh)
    several = len(evaluation.protocols) > 1
    arms = {f"{row}, {p}" if several else row: results for row, by in by_row.items() for p, results in by.items()}
    if not hosts.is_first():
        return
    name, last = rows[-1].name, by_row[rows[-1].name]
    queries = last[evaluation.protocols[0]].queries
    assert queries is not None  # `evaluate_embedded` gives them
    gaps = {}
    if other is not None:
        gaps[f"{name} - {evaluation.compare}"] = recall_intervals([queries], [other])
    save_queries(workdir / f"queries_{_stem(config, dataset)}.npz", queries)
    cards = {f"{name}, {protocol}": results.card for protocol, results in last.items()}
    _write(config, workdir, dataset, arms, gaps, cards, card)
    remove_folder(workdir / SCORES)


def _stem(config: ConfigDict, dataset: DataSet) -> str:
    """The part of a results file's name that distinguishes evaluations."""
    evaluation, protocols = config.eval, "+".join(config.eval.protocols)
    stem = f"{dataset.path.parent.name}_{evaluation.split}_{protocols}_{evaluation.checkpoint}"
    if evaluation.two_stage and not evaluation.exact:  # beside the results of an exact ranking
        stem += f"_two_stage_{evaluation.two_stage}"
        sizes = "_".join(str(evaluation.fde[name]) for name in ("k_sim", "r_reps", "d_proj", "d_final"))
        stem += "" if evaluation.stage_one == "vectors" else f"_{evaluation.stage_one}_{sizes}"
    if evaluation.dims:
        stem += "_dims_" + "_".join(map(str, evaluation.dims))
    return stem


def _write(
    config: ConfigDict,
    workdir: Path,
    dataset: DataSet,
    arms: Mapping[str, Results],
    gaps: Mapping[str, Mapping[str, Interval]],
    cards: Mapping[str, dict[str, str | int]],
    print_cards: bool,
) -> None:
    """Writes tables and cards as Markdown, HTML and JSON; prints tables, and cards if wanted, and the files' names."""
    evaluation, stem = config.eval, _stem(config, dataset)
    tables = [
        table(arms),
        comparison_table(arms) if evaluation.two_stage and not evaluation.ensemble else None,
        extra_table(arms),
        interval_table({n: arm.intervals for n, arm in arms.items()} | dict(gaps)),
    ]
    shown = [one for one in tables if one is not None]
    card_tables = [card_table(card, name) for name, card in cards.items()]
    title = f"{config.name} on {dataset.path.parent.name}, {evaluation.split}"
    write_text(workdir / f"results_{stem}.json", to_json(arms, gaps))
    write_text(workdir / f"results_{stem}.md", "\n".join(map(str, [*shown, *card_tables])))
    write_text(workdir / f"results_{stem}.html", results_page(title, shown, card_tables))
    print("\n".join(map(str, [*shown, *(card_tables if print_cards else [])])))
    print(f"{workdir / f'results_{stem}'}.html, .md and .json have these tables and the protocol cards")
    print(f"{workdir / f'queries_{stem}.npz'} has the ranks, for --config.eval.compare of another run")


def _rows(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[list[Embedded], DataSet, ExtraMetrics]:
    """The encoded galleries, the one that the command is about last; data set and extra metrics of the first."""
    evaluation, runs = config.eval, config.eval.ensemble
    if runs:
        _check_ensemble(config)
    first = load_any(runs[0], config) if runs else load(workdir, config)
    dataset = first.experiment.dataset
    extra = read_extra_metrics(dataset, evaluation.split, evaluation)
    members = [_embed(Evaluator(first.experiment, evaluation.split, mesh), first)]
    if not runs:
        one, folder = dataclasses.replace(members[0], name=config.name), workdir / SCORES
        if sizes := tuple(evaluation.dims):
            check_sizes(first.experiment, sizes, "eval.dims")
            if evaluation.two_stage:
                raise ValueError("config.eval.dims and config.eval.two_stage: rank by one of them, the other off")
            cut = {size: (prefix(one.images, size), prefix(one.texts, size)) for size in sizes}
            rows = [
                dataclasses.replace(one, name=f"{one.name}, {size} numbers", images=images, texts=texts)
                for size, (images, texts) in cut.items()
            ]
            return [*rows, one], dataset, extra
        methods = choose_ranking_methods(first.experiment, first.variables, mesh, one.provenance, folder)
        if len(methods) > 1:
            rows = [dataclasses.replace(one, name=f"{one.name}, {method.name}", method=method) for method in methods]
            return rows, dataset, extra
        return [dataclasses.replace(one, method=methods[0]) if methods else one], dataset, extra
    # One after another: only one model's parameters are on the devices.
    del first
    for run in runs[1:]:
        member = load_any(run, config)
        members.append(_embed(Evaluator(member.experiment, evaluation.split, mesh), member))
        del member
    if len({member.name for member in members}) < len(members):
        members = [dataclasses.replace(m, name=f"{m.name} ({run})") for m, run in zip(members, runs, strict=True)]
    together = combine(f"ensemble of {len(members)}", members, evaluation.ensemble_weights)
    return [*members, together], dataset, extra


def _check_ensemble(config: ConfigDict) -> None:
    """Raises ValueError for a wrong config.eval.ensemble, before anything is encoded."""
    evaluation, runs = config.eval, config.eval.ensemble
    if len({*map(str, runs)}) < len(runs) or len(runs) < 2:
        raise ValueError(f"config.eval.ensemble is {tuple(runs)}; expected at least 2 different work folders")
    if evaluation.two_stage:
        raise ValueError(TWO_STAGE_ENSEMBLE)
    if evaluation.dims:
        raise ValueError("config.eval.dims is for one run: set it to (), or config.eval.ensemble to ()")
    mean_score([RetrievalModel.score] * len(runs), evaluation.ensemble_weights)
    for run in runs:
        trained_config(Path(run), config)
