"""Several arms of one configuration, each with several seeds, trained and compared on the same split."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from shnet_jax.data.checksums import CHECKSUMS
from shnet_jax.data.records import find_dataset
from shnet_jax.evaluation.bootstrap import NAMES, Interval, load_queries, recall_intervals, save_queries
from shnet_jax.evaluation.metrics import Metrics, QueryRanks
from shnet_jax.evaluation.protocols import Results
from shnet_jax.evaluation.report import PERSON, as_dict, card_table, from_dict, interval_table, intervals_as_dict
from shnet_jax.evaluation.zero_shot import NAME as ZERO_SHOT
from shnet_jax.experiment import assemble
from shnet_jax.modes.evaluate import TWO_STAGE_ENSEMBLE, evaluate_checkpoint, evaluate_loaded, evaluate_zero_shot
from shnet_jax.modes.study_jobs import started, usable_jobs
from shnet_jax.observe.clock import KINDS, read_wall_time, shares
from shnet_jax.observe.files import write_json, write_text
from shnet_jax.observe.results_page import results_page
from shnet_jax.observe.table import Table
from shnet_jax.observe.writer import FILE as METRICS
from shnet_jax.observe.writer import read_metrics
from shnet_jax.parallel import hosts
from shnet_jax.training.load import load_any
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.training.setup import setup_training

FINISHED, QUERIES = "study_run.json", "study_queries.npz"
"""Files of a finished run: its configuration and results, and the ranks of its queries."""
DIFFERENCE = " - "
"""Separator between the names of a pair of config.study.compare."""
HEADINGS = ("image to text R@1", "R@5", "R@10", "text to image R@1", "R@5", "R@10", "rSum")


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained run: its results on config.eval.split, minutes of training and pairs per second.

    spent: seconds of wall time by `clock.KINDS`. Of an ensemble: the minutes of all its members, and no speed.
    """

    seed: int
    results: Results
    minutes: float
    examples_per_second: float | None
    spent: dict[str, float] | None = None


def study(config: ConfigDict, workdir: str | Path) -> dict[str, list[Run]]:
    """Trains config.study.arms with config.study.seeds below `workdir` and evaluates the best checkpoint of each.

    Up to config.study.jobs runs at the same time; several processes train each run together. Then
    config.study.ensembles of arms of the same seed. An interrupted study continues with the same command; finished runs
    are not repeated. Prints the tables and writes them to study.md, with charts and protocol cards to study.html, and
    with all numbers to study.json. Raises ValueError for an arm that the configuration does not have.
    """
    workdir = Path(workdir)
    jobs = usable_jobs(config, workdir)
    arms, ensembles = _plan(config)
    runs: dict[str, list[Run]] = {}
    pretrained = evaluate_zero_shot(arm_config(config, arms[0], seed=0))
    folders = {(arm, seed): workdir / arm / f"seed_{seed}" for arm in arms for seed in config.study.seeds}
    missing = [
        (arm, seed, folder)
        for (arm, seed), folder in folders.items()
        if jobs > 1 and _finished(arm_config(config, arm, seed), folder) is None
    ]
    with started(config, missing, jobs) as wait:
        for (arm, seed), folder in folders.items():
            wait(arm, seed)
            runs.setdefault(arm, []).append(run_one(config, arm, seed, folder))
            text = _write(config, runs, pretrained, workdir)
    for name, members in ensembles.items():
        runs[name] = []
        for place, seed in enumerate(config.study.seeds):
            loaded = [load_any(workdir / arm / f"seed_{seed}", arm_config(config, arm, seed)) for arm in members]
            minutes = sum(runs[arm][place].minutes for arm in members)
            runs[name].append(Run(seed, evaluate_loaded(loaded, config, name), minutes, None))
            text = _write(config, runs, pretrained, workdir)
    if hosts.is_first():
        print(f"\n{config.name} on split {config.eval.split} of {config.data.dir}\n\n{text}")
    return runs


def _plan(config: ConfigDict) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The arms that are run, and the ensembles of which all members are; raises ValueError for a mistake in any."""
    arms = config.study.only or tuple(config.study.arms)
    if not arms or not config.study.seeds:
        raise ValueError("a study needs at least one arm in config.study.arms and one seed in config.study.seeds")
    for field, values in (("seeds", config.study.seeds), ("only", config.study.only)):
        if len(set(values)) < len(values):
            raise ValueError(f"config.study.{field} is {tuple(values)}; expected each once")
    unknown = [arm for arm in arms if arm not in config.study.arms]
    if unknown:
        raise ValueError(f"config.study.only names {unknown}; config.study.arms has {list(config.study.arms)}")
    for arm in arms:
        try:
            setup_training(assemble(arm_config(config, arm, seed=0)))
        except ValueError as error:
            raise ValueError(f"config.study.arms.{arm}: {error}") from error
    for name, members in config.study.ensembles.items():
        unknown = [arm for arm in members if arm not in config.study.arms]
        if unknown or len(set(members)) < 2 or name in config.study.arms:
            raise ValueError(
                f"config.study.ensembles.{name} is {tuple(members)}; expected a name that is no arm, and at least 2 of "
                f"the arms {list(config.study.arms)}"
            )
    ensembles = {name: tuple(members) for name, members in config.study.ensembles.items() if {*members} <= {*arms}}
    if ensembles and not config.eval.exact:
        raise ValueError(TWO_STAGE_ENSEMBLE)
    known = [*config.study.arms, *config.study.ensembles]
    for pair in config.study.compare:
        if not {*pair.split(DIFFERENCE)} <= {*known} or pair.count(DIFFERENCE) != 1:
            raise ValueError(f"config.study.compare has {pair!r}; expected 'ARM{DIFFERENCE}OTHER', both of {known}")
    return arms, ensembles


def _write(config: ConfigDict, runs: Mapping[str, list[Run]], pretrained: Results | None, workdir: Path) -> str:
    """Writes study.md, study.html and study.json, each whole or not at all; the tables."""
    gaps, tables = differences(runs, config.study.compare), [table(runs, pretrained)]
    if gaps:
        tables.append(interval_table(gaps))
    tables += filter(None, [wall_time_table(runs)])
    text = "\n".join(map(str, tables))
    if not hosts.is_first():
        return text
    from shnet_jax.modes.study_charts import study_charts, validation_curve  # matplotlib is slow to import

    document: dict[str, Any] = {arm: [_as_dict(run) for run in arm_runs] for arm, arm_runs in runs.items()}
    if pretrained is not None:
        document[ZERO_SHOT] = [{"results": as_dict(pretrained)}]
    if gaps:
        document["differences"] = intervals_as_dict(gaps)
    write_text(workdir / "study.md", text)
    cards = [card_table(run.results.card, f"{arm}, seed {run.seed}") for arm in runs for run in runs[arm]]
    recalls = {arm: [run.results.metrics for run in arm_runs] for arm, arm_runs in runs.items()}
    histories = {arm: [workdir / arm / f"seed_{run.seed}" / METRICS for run in runs[arm]] for arm in runs}
    curves = {
        arm: [validation_curve(list(read_metrics(path))) for path in paths if path.is_file()]
        for arm, paths in histories.items()
    }
    title, figures = f"{config.name}, {config.eval.split}", study_charts(recalls, curves)
    write_text(workdir / "study.html", results_page(title, tables, cards, figures))
    write_json(workdir / "study.json", document)
    return text


def _as_dict(run: Run) -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(run, results=dataclasses.replace(run.results, queries=None)))
    return fields | {"results": as_dict(run.results)}


def differences(runs: Mapping[str, list[Run]], pairs: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Differences of ARM and OTHER for each "ARM - OTHER": paired bootstrap over images, seeds averaged.

    Of the seeds that both arms have: an unfinished study compares like with like. Pairs without any are left out.
    """
    intervals = {}
    for pair in pairs:
        ours, others = (runs.get(arm, []) for arm in pair.split(DIFFERENCE))
        if seeds := {run.seed for run in ours} & {run.seed for run in others}:
            intervals[pair] = recall_intervals(_queries(ours, seeds), _queries(others, seeds))
    return intervals


def _queries(runs: list[Run], seeds: set[int]) -> list[QueryRanks]:
    return [run.results.queries for run in runs if run.seed in seeds and run.results.queries is not None]


def arm_config(config: ConfigDict, arm: str, seed: int) -> ConfigDict:
    """The configuration of one run of a study; ValueError for a field that there is not or a value of another type."""
    changed = ConfigDict(config.to_dict()).lock()
    try:
        changed.update(config.study.arms[arm].to_dict())
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"config.study.arms.{arm}: {' '.join(str(error.args[0]).split())}") from None
    changed.seed = seed
    changed.name = f"{config.name}, {arm}"
    return changed


TOOLS = ("convert", "cross", "page", "plan", "scale", "search", "study")
"""Sections of a configuration that no result of a run depends on."""


def _finished(config: ConfigDict, workdir: Path) -> Run | None:
    """The finished run in `workdir`, from the files that `_keep` wrote; None where it is to be trained or evaluated.

    That is so for another configuration, without its checkpoint, and for a data set that has changed.
    """
    path = workdir / FINISHED
    try:
        document = json.loads(path.read_text("utf-8"))
        queries = load_queries(workdir / QUERIES)
        run = Run(**document["run"] | {"results": from_dict(document["run"]["results"], queries)})
        same_config = _identity(ConfigDict(document["config"])) == _identity(config)
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    kept, now = workdir / CHECKSUMS, find_dataset(config.data.dir) / CHECKSUMS
    same_data = not kept.exists() or not now.exists() or kept.read_bytes() == now.read_bytes()
    checkpoint = workdir / "checkpoints" / str(run.results.card["checkpoint_step"])
    return run if same_config and same_data and checkpoint.is_dir() else None


def _keep(run: Run, config: ConfigDict, workdir: Path) -> None:
    """Writes what `_finished` reads; the file that says so comes last."""
    assert run.results.queries is not None  # an evaluation has them
    save_queries(workdir / QUERIES, run.results.queries)
    write_json(workdir / FINISHED, {"config": _identity(config), "run": _as_dict(run)})


def _identity(config: ConfigDict) -> dict[str, Any]:
    """A configuration as JSON values, without TOOLS and the tile of a loss, which changes nothing."""
    values = json.loads(json.dumps({name: value for name, value in config.to_dict().items() if name not in TOOLS}))
    values["loss"].get("pairs", {}).pop("tile", None)
    return values


def run_one(config: ConfigDict, arm: str, seed: int, workdir: Path) -> Run:
    """Trains and evaluates one run of a study in its work folder; one that is finished there is read."""
    changed = arm_config(config, arm, seed)
    if hosts.is_first():
        print(f"\n{changed.name}, seed {seed}: {workdir}", flush=True)
    finished = _finished(changed, workdir)
    if not hosts.anywhere(finished is None):
        assert finished is not None
        if hosts.is_first():
            print(f"finished: rSum {finished.results.metrics['rsum']:.1f}", flush=True)
        return finished
    train_and_evaluate(changed, workdir)
    results = evaluate_checkpoint(changed, workdir)
    timing = [line["timing"] for line in read_metrics(workdir / METRICS) if line["kind"] == "train"][-1]
    spent = (read_wall_time(workdir) or {}).get("spent")
    run = Run(seed, results, timing["seconds"] / 60, timing["examples"] / timing["seconds"], spent)
    hosts.by_first(lambda: _keep(run, changed, workdir))
    return run


def table(runs: Mapping[str, list[Run]], pretrained: Results | None = None) -> Table:
    """A row for each arm (mean ± standard deviation over its seeds), a pretrained encoder and chance."""
    rows = []
    guess: Metrics = next(iter(runs.values()))[0].results.chance
    persons = [name for name in PERSON if name in guess]
    columns = [*NAMES, *persons]
    for arm, arm_runs in runs.items():
        cells = [_mean(arm_runs, column) for column in columns]
        minutes = statistics.mean(run.minutes for run in arm_runs)
        speeds = [run.examples_per_second for run in arm_runs if run.examples_per_second is not None]
        speed = f"{statistics.mean(speeds):.0f}" if speeds else ""
        rows.append([arm, str(len(arm_runs)), *cells, f"{minutes:.1f}", speed])
    others = {} if pretrained is None else {ZERO_SHOT: pretrained.metrics}
    for name, metrics in (others | {"chance": guess}).items():
        rows.append([name, "", *(f"{metrics[c]:.1f}" if c in metrics else "" for c in columns), "", ""])
    heading = ["arm", "seeds", *HEADINGS, *(PERSON[c] for c in persons), "minutes", "pairs/s"]
    return Table("Recall in per cent, mean and standard deviation over seeds", heading, rows)


def wall_time_table(runs: Mapping[str, list[Run]]) -> Table | None:
    """A row for each arm: minutes of wall time, mean over its seeds, and their shares; None where none is known.

    The share of "step" is the goodput.
    """
    rows = []
    for arm, arm_runs in runs.items():
        known = [run.spent for run in arm_runs if run.spent is not None]
        if known:
            total = {kind: sum(spent[kind] for spent in known) for kind in KINDS}
            minutes = sum(total.values()) / 60 / len(known)
            rows.append([arm, f"{minutes:.1f}", *(f"{100 * share:.1f}" for share in shares(total).values())])
    title = "Wall time of training in minutes, and its parts in per cent: step is goodput, lost is what restarts repeat"
    return Table(title, ["arm", "minutes", *(f"{kind} %" for kind in KINDS)], rows) if rows else None


def _mean(runs: list[Run], column: str) -> str:
    values = [run.results.metrics[column] for run in runs]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
