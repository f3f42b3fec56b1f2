"""What a work folder holds beside checkpoints and logs, and which configuration may go on in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax import foreign, registry
from shnet_jax.data.checksums import CHECKSUMS
from shnet_jax.data.tokenise import vocabulary_file
from shnet_jax.experiment import Experiment

CONFIG = "config.json"

# What may differ between the runs of one work folder: nothing that changes the parameters. Data set and vocabulary may
# have moved, so their paths are free and their contents are compared.
FREE_TO_CHANGE = (
    "config.convert.",
    "config.cross.",
    "config.data.dir",
    "config.data.prefetch",
    "config.data.read_threads",
    "config.eval.",
    "config.name",
    "config.page.",
    "config.parallel.devices",
    "config.plan.",
    "config.scale.",
    "config.search.",
    "config.study.",
    "config.text.weights",
    "config.tokenizer.path",
    "config.train.keep",
    "config.train.on_nonfinite",
)


# Of these, what decides which state is the best one: numbers of two kinds cannot be compared.
SELECTING = ("config.eval.person", "config.eval.protocols")


class WorkdirError(RuntimeError):
    """A folder is not the work folder of a run, or not of this one."""


def claim(workdir: Path, experiment: Experiment) -> None:
    """Makes `workdir` the folder of this configuration, or checks that it is; keeps vocabulary and checksums in it.

    A folder without a checkpoint holds nothing that another configuration could spoil. Raises WorkdirError with what
    differs: fields, the vocabulary or the data set.
    """
    path = workdir / CONFIG
    source = vocabulary_file(experiment.config)
    kept = {workdir / f"vocabulary{source.suffix}": source, workdir / CHECKSUMS: experiment.dataset.path / CHECKSUMS}
    if any((workdir / "checkpoints").glob("*")):
        if not path.exists():
            raise WorkdirError(f"{workdir} holds checkpoints but no {CONFIG}; choose another --workdir")
        found = differences(experiment.config.to_dict(), load_config(path).to_dict())
        found = [line for line in found if line.startswith(SELECTING) or not line.startswith(FREE_TO_CHANGE)]
        for copy, original in kept.items():
            if copy.exists() and original.exists() and copy.read_bytes() != original.read_bytes():
                found.append(f"{original} differs from what the run began with, {copy.name}")
        if found:
            raise WorkdirError(
                f"{workdir} holds a run of another configuration; choose another --workdir or go back to:\n  "
                + "\n  ".join(found)
            )
        return
    path.unlink(missing_ok=True)  # until all is in place
    workdir.mkdir(parents=True, exist_ok=True)
    for copy, original in kept.items():
        copy.unlink(missing_ok=True)
        if original.exists():  # sets of other tools have no checksums
            shutil.copyfile(original, copy)
    save_config(experiment.config, path)


def adopt(workdir: Path, config: ConfigDict | FrozenConfigDict, vocabulary: Path) -> None:
    """Makes `workdir` the folder of a model that was trained elsewhere: its configuration and a copy of its vocabulary.

    Raises WorkdirError for a folder that has checkpoints.
    """
    if any((workdir / "checkpoints").glob("*")):
        raise WorkdirError(f"{workdir} holds checkpoints already; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    for old in workdir.glob("vocabulary.*"):
        old.unlink()
    shutil.copyfile(vocabulary, workdir / f"vocabulary{vocabulary.suffix}")
    save_config(config, workdir / CONFIG)


def trained_config(workdir: Path, own: ConfigDict | None = None) -> ConfigDict:
    """The configuration of the run in `workdir`, its vocabulary being the one kept there.

    own: the user's configuration. A run may name modules outside shnet_jax only where that names them too, as the
    folder may be somebody else's (`registry.check_known`). Raises WorkdirError or ValueError.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise WorkdirError(f"{workdir}: no {CONFIG}; not the work folder of a training run")
    vocabulary = next(workdir.glob("vocabulary.*"), None)
    if vocabulary is None:
        raise WorkdirError(f"{workdir}: no vocabulary file; was the folder copied whole?")
    config = load_config(path)
    registry.check_known(_modules(path, config), str(path), [] if own is None else _modules(path, own))
    config.tokenizer.path = str(foreign.inside(workdir, vocabulary.name))
    return config


def _modules(path: Path, config: ConfigDict) -> list[str]:
    """The modules that a configuration names: model and text tower; names of losses cannot have dots."""
    for section in ("model", "text", "loss", "tokenizer", "data", "eval", "optim"):
        if not isinstance(config.get(section), ConfigDict):
            raise WorkdirError(f"{path}: {section} is {config.get(section)!r:.80}, expected a section; not of a run")
    names = [config.model.get("name"), config.text.get("tower")]
    if not all(isinstance(name, str) for name in names):
        raise WorkdirError(f"{path}: model.name and text.tower are {names!r:.200}, expected names")
    return names


def save_config(config: ConfigDict | FrozenConfigDict, path: Path) -> None:
    """The configuration as JSON, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_config(path: Path) -> ConfigDict:
    """A configuration saved by `save_config`. Raises ValueError for a file that is none."""
    found = foreign.read_object(path)
    try:
        return ConfigDict(_tuples(found))
    except (TypeError, ValueError, AttributeError) as error:  # names that a field cannot have
        raise ValueError(f"{path}: no configuration: {error}") from None


def complete(saved: ConfigDict, like: ConfigDict) -> ConfigDict:
    """The configuration of a run, with the fields of `like` that are younger than it switched off.

    A field that a run's file does not have did not exist when it was trained, and what it asks for was not done: it is
    False, 0, "" or (), as its default in configs/base.py then has to be.
    """
    found = ConfigDict(saved.to_dict())
    for name, value in like.items():
        if isinstance(value, ConfigDict) and not isinstance(found.get(name, value), ConfigDict):
            raise WorkdirError(f"the configuration of the run has {found[name]!r:.80} as {name}, expected a section")
        if isinstance(value, ConfigDict):
            found[name] = complete(found.get(name, ConfigDict()), value)
        elif name not in found:
            found[name] = type(value)()
    return found


def _tuples(section: dict[str, Any]) -> dict[str, Any]:
    """A section as `save_config` was given it: JSON has lists in place of tuples."""

    def tuples(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else _tuples(value) if isinstance(value, dict) else value

    return {key: tuples(value) for key, value in section.items()}


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "config") -> list[str]:
    """Fields in which two configurations differ, one line each."""
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b, name = ours.get(key, "absent"), theirs.get(key, "absent"), f"{prefix}.{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, name)
        elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            lines.append(f"{name}: {a!r}, there {b!r}")
    return lines
