"""Configuration of a run that is there: `--config=shnet_jax/stored_config.py:WORKDIR`, the default of many modes."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax import storage
from shnet_jax.bundled import get_config as bundled_config
from shnet_jax.paths import to_path
from shnet_jax.training.workdir import CONFIG, WorkdirError, complete, trained_config

TOOLS = ("eval", "search", "page", "cross", "convert", "plan", "scale", "study", "mine")
"""Sections that say what is done with a trained model; the run's own choice, younger fields by their default."""


def get_config(workdir: str) -> ConfigDict:
    """The configuration that trained the run in `workdir`, with the fields that were added to the program since.

    Later fields of the model and of training are off, as they were then. Later fields of the tools have their
    defaults. Raises ValueError where there is no run; the message names runs in folders below it.
    """
    folder = Path(workdir)
    try:
        saved = trained_config(folder)
    except WorkdirError as error:
        raise ValueError(f"{error}{_runs_below(folder)}") from None
    base = bundled_config("base")
    for section in TOOLS:
        saved[section] = ConfigDict(base[section].to_dict() | saved.get(section, ConfigDict()).to_dict())
    saved.data.dir = _data_set(saved.data.dir, folder)
    return complete(saved, base)


def _data_set(directory: str, workdir: Path) -> str:
    """The data set of a run. A relative path that leads nowhere from here is tried from each folder above the run.

    Runs are trained from such a folder, so that their modes work from any other one.
    """
    if not directory or storage.is_url(directory) or Path(directory).exists() or to_path(directory).is_absolute():
        return directory
    above = (parent / directory for parent in workdir.resolve().parents)
    return next((str(path) for path in above if path.exists()), directory)


def _runs_below(folder: Path) -> str:
    runs = sorted({path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/{CONFIG}")})
    if not runs:
        return "; give the --workdir of a run, or --config"
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    return f"; runs below it: {', '.join(map(str, runs[:3]))}{more}"
