"""Several arms of one configuration, each with several seeds, trained and compared on the same split."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax.commands import evaluate_checkpoint
from shnet_jax.evaluate.protocols import Results
from shnet_jax.evaluate.recall import Metrics
from shnet_jax.evaluate.report import markdown
from shnet_jax.observe.writer import read_metrics
from shnet_jax.train.loop import train_and_evaluate

COLUMNS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "rsum")
HEADINGS = ("i→t R@1", "R@5", "R@10", "t→i R@1", "R@5", "R@10", "rSum")


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained run: its results on config.eval.split, minutes of training and pairs per second."""

    seed: int
    results: Results
    minutes: float
    examples_per_second: float


def study(config: ConfigDict, workdir: str | Path) -> dict[str, list[Run]]:
    """Trains config.study.arms with config.study.seeds below `workdir` and evaluates the best checkpoint of each.

    An interrupted study continues with the same command; finished runs are not repeated. Prints the table and writes it
    with all numbers to study.md and study.json. Raises ValueError for an arm that the configuration does not have.
    """
    workdir = Path(workdir)
    arms = config.study.only or tuple(config.study.arms)
    if not arms or not config.study.seeds:
        raise ValueError("a study needs at least one arm in config.study.arms and one seed in config.study.seeds")
    unknown = [arm for arm in arms if arm not in config.study.arms]
    if unknown:
        raise ValueError(f"config.study.only names {unknown}; config.study.arms has {list(config.study.arms)}")
    for arm in arms:
        arm_config(config, arm, seed=0)  # a mistake in the last arm is told before the first is trained
    runs: dict[str, list[Run]] = {}
    for arm in arms:
        runs[arm] = []
        for seed in config.study.seeds:
            runs[arm].append(_run(config, arm, seed, workdir / arm / f"seed_{seed}"))
            (workdir / "study.md").write_text(table(runs), encoding="utf-8")
            document = {a: [dataclasses.asdict(run) for run in found] for a, found in runs.items()}
            (workdir / "study.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\n{config.name} on split {config.eval.split} of {config.data.dir}\n\n{table(runs)}")
    return runs


def arm_config(config: ConfigDict, arm: str, seed: int) -> ConfigDict:
    """The configuration of one run of a study; ValueError for a field that there is not or a value of another type."""
    own = ConfigDict(config.to_dict()).lock()
    try:
        own.update(config.study.arms[arm].to_dict())
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"config.study.arms.{arm}: {' '.join(str(error.args[0]).split())}") from None
    own.seed = seed
    own.name = f"{config.name}, {arm}"
    return own


def _run(config: ConfigDict, arm: str, seed: int, workdir: Path) -> Run:
    own = arm_config(config, arm, seed)
    print(f"\n{own.name}, seed {seed}: {workdir}", flush=True)
    train_and_evaluate(own, workdir)
    results = evaluate_checkpoint(own, workdir)
    timing = [line["timing"] for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"][-1]
    return Run(seed, results, timing["seconds"] / 60, timing["examples"] / timing["seconds"])


def table(runs: Mapping[str, list[Run]]) -> str:
    """Markdown: one row per arm (mean over its seeds; rSum with standard deviation) and one for chance."""
    rows = []
    for arm, found in runs.items():
        mean = [statistics.mean(run.results.metrics[c] for run in found) for c in COLUMNS]
        cells = [f"{value:.1f}" for value in mean]
        if len(found) > 1:
            cells[-1] += f" ± {statistics.stdev(run.results.metrics['rsum'] for run in found):.1f}"
        minutes = statistics.mean(run.minutes for run in found)
        speed = statistics.mean(run.examples_per_second for run in found)
        rows.append([arm, str(len(found)), *cells, f"{minutes:.1f}", f"{speed:.0f}"])
    guess: Metrics = next(iter(runs.values()))[0].results.chance
    rows.append(["chance", "", *(f"{guess[c]:.1f}" for c in COLUMNS), "", ""])
    return markdown(["arm", "seeds", *HEADINGS, "minutes", "pairs/s"], rows)
