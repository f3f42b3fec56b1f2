"""--mode=cross: every run on every data set, without training, to test models on data that they have not seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax.data.records import find_dataset
from shnet_jax.evaluation.protocols import Results
from shnet_jax.evaluation.report import card_table, table, to_json
from shnet_jax.evaluation.zero_shot import NAME as ZERO_SHOT
from shnet_jax.modes.evaluate import evaluate_loaded, evaluate_zero_shot
from shnet_jax.observe.files import LOCK, write_text
from shnet_jax.observe.results_page import results_page
from shnet_jax.observe.table import Table
from shnet_jax.storage import is_url
from shnet_jax.training.load import load_any
from shnet_jax.training.workdir import sole_job, trained_config

Matrix = dict[str, dict[str, Results]]
"""Results by run, then by data set."""


def cross(config: ConfigDict, workdir: str | Path) -> Matrix:
    """Evaluates the runs config.cross.runs on config.eval.split of each of config.cross.data_dirs.

    In two stages where config.eval.exact is False. A run keeps its vocabulary and its checkpoint, which its own
    validation split chose: nothing is tuned to the other data sets. Prints the tables and writes them to cross.md and,
    with all cards, to cross.html and cross.json in `workdir`, after each evaluation. Raises ValueError when there is
    nothing to do or two rows or columns have the same name, and what `load.load_any` raises for a run or a data set
    that does not fit it.
    """
    workdir = Path(workdir)
    columns = {find_dataset(folder).parent.name: folder for folder in config.cross.data_dirs}
    rows = {_row(Path(run), config): run for run in config.cross.runs}
    for field, given, named in (("runs", config.cross.runs, rows), ("data_dirs", config.cross.data_dirs, columns)):
        if not given or len(named) < len(given):
            raise ValueError(
                f"config.cross.{field} is {tuple(given)}; expected at least one, all with names of their own, "
                f"found {list(named)}"
            )
    with sole_job(workdir, LOCK):
        return _cross(config, workdir, rows, columns)


def _cross(config: ConfigDict, workdir: Path, rows: Mapping[str, str], columns: Mapping[str, str]) -> Matrix:
    matrix: Matrix = {}
    for row, run in rows.items():
        for column, folder in columns.items():
            results = evaluate_loaded([load_any(run, _on(config, folder))], config)
            matrix.setdefault(row, {})[column] = results
            _write(matrix, workdir)
    for column, folder in columns.items():
        if (pretrained := evaluate_zero_shot(_on(config, folder))) is not None:
            matrix.setdefault(ZERO_SHOT, {})[column] = pretrained
    print(_write(matrix, workdir))
    return matrix


def _on(config: ConfigDict, folder: str) -> ConfigDict:
    moved = ConfigDict(config.to_dict())
    moved.data.dir = folder
    return moved


def _row(run: Path, given: ConfigDict) -> str:
    """Name of a run, and the data set that it was trained on."""
    config = trained_config(run, given)
    folder = find_dataset(config.data.dir).parent if is_url(config.data.dir) else Path(config.data.dir)
    trained_on = folder.parent.name if (folder / "dataset_info.json").is_file() else folder.name
    return f"{config.name}, seed {config.seed}, trained on {trained_on}"


def _write(matrix: Matrix, workdir: Path) -> str:
    arms = {f"{row} → {column}": results for row, by_column in matrix.items() for column, results in by_column.items()}
    tables = [rsums(matrix), table(arms)]
    text = "\n".join(map(str, tables))
    write_text(workdir / "cross.json", to_json(arms))
    write_text(workdir / "cross.md", text)
    cards = [card_table(results.card, arm) for arm, results in arms.items()]
    write_text(workdir / "cross.html", results_page("Every run on every data set", tables, cards))
    return text


def rsums(matrix: Mapping[str, Mapping[str, Results]]) -> Table:
    """rSum, a row for each run and a column for each data set."""
    columns = list(dict.fromkeys(column for by_column in matrix.values() for column in by_column))
    cells = [
        [row, *(f"{by_column[c].metrics['rsum']:.1f}" if c in by_column else "" for c in columns)]
        for row, by_column in matrix.items()
    ]
    return Table("rSum, of 600", ["rSum", *columns], cells)
