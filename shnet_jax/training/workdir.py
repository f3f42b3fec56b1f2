"""The work folder of a run: its configuration and vocabulary, and which configuration may continue in it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax import registry, untrusted
from shnet_jax.data.checksums import CHECKSUMS
from shnet_jax.data.negatives import SOURCE as NEGATIVES
from shnet_jax.data.tokenise import kept_vocabulary, vocabulary_file
from shnet_jax.experiment import Experiment, automatic
from shnet_jax.models.text import VECTORS
from shnet_jax.observe.files import LOCK, sole_writer, write_text
from shnet_jax.observe.machine import fast_dtype
from shnet_jax.parallel import hosts
from shnet_jax.paths import to_path
from shnet_jax.training.extend import LENGTH, refused_extension
from shnet_jax.training.integrity import set_damaged_aside

CONFIG = "config.json"

log = logging.getLogger(__name__)

BLOCK = "config.model.cmsei.block"
"""Pairs scored at once: the score is the same."""

# Fields that may change between the runs of one work folder, as no parameter depends on them. Data set, vocabulary and
# hard negatives may have moved: their contents are compared instead of their paths.
FREE_TO_CHANGE = (
    "config.convert.",
    "config.cross.",
    "config.data.dir",
    "config.data.negatives.folder",
    "config.data.prefetch",
    "config.data.read_threads",
    "config.eval.",
    "config.loss.pairs.tile",  # candidates scored at once: the loss is the same
    "config.mine.",
    BLOCK,
    "config.name",
    "config.page.",
    "config.parallel.devices",
    "config.plan.",
    "config.scale.",
    "config.search.",
    "config.study.",
    "config.text.weights",
    "config.tokenizer.path",
    "config.train.init_from",  # of the first step alone
    "config.train.init_partial",
    "config.train.keep",
    "config.train.log_project",
    "config.train.log_tags",
    "config.train.log_to",
    "config.train.on_nonfinite",
    "config.train.profile_steps",
)
# Of these, fields that decide which checkpoint is the best: numbers of two kinds cannot be compared.
SELECTING = ("config.eval.person", "config.eval.protocols")

# Fields that have to be off in a run that is older than they, as they would change what it learns. Other younger fields
# are options of something that is off, or name what the run did anyway, and are taken as they are given.
SWITCHES = re.compile(
    r"config\.(loss\.weights\.|loss\.\w+\.warmup_(steps|percent)$|optim\.|momentum\.(queue|from_)|model\.\w+$"
    r"|loss\.matryoshka$|data\.negatives\.|train\.(log|checkpoint)_(epochs|percent)$|train\.eval_(steps|percent)$)"
)


class WorkdirError(RuntimeError):
    """A folder is not the work folder of a run, or not of this one."""


@contextmanager
def claimed(workdir: Path, experiment: Experiment) -> Iterator[None]:
    """Holds `workdir` for this configuration and this job alone, with damaged checkpoints set aside.

    Raises what process 0 finds against it, in all processes: FolderInUse, WorkdirError, CheckpointError or OSError.
    """

    def check() -> None:
        claim(workdir, experiment)
        set_damaged_aside(workdir)

    with sole_job(workdir, LOCK, check):
        yield


@contextmanager
def sole_job(folder: Path, name: str, check: Callable[[], None] | None = None) -> Iterator[None]:
    """`sole_writer(folder, name)` for all processes of a job: process 0 takes the lock, then calls `check`.

    Raises what process 0 finds against it: FolderInUse, WorkdirError, CheckpointError or OSError. The other processes
    raise ValueError then.
    """
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(sole_writer(folder, name))
            if check is not None:
                check()

        hosts.by_first(claim)  # all end, none waits for the others
        yield


def with_dtypes(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Settles the dtypes "auto" of a run that began before, and of a job of several machines.

    A run in `workdir` keeps the dtypes that it began with. A job takes float32 unless all its machines are fast at
    bfloat16. `assemble` settles the others for this machine.
    """
    config = ConfigDict(config.to_dict())
    path = workdir / CONFIG
    if automatic(config) and path.exists() and any((workdir / "checkpoints").glob("*")):
        saved = load_config(path).to_dict()
        for section in automatic(config):
            began = _value(saved, f"config.{section}.dtype")
            if isinstance(began, str) and began:
                config[section].dtype = began
                log.info("config.%s.dtype: auto is %s, as the run in %s began with", section, began, workdir)
    if jax.process_count() > 1 and (sections := automatic(config)):  # they run one program
        slow = fast_dtype(jax.local_devices()[0])[0] == "float32"
        if hosts.anywhere(slow):
            for section in sections:
                config[section].dtype = "float32"
            log.info("dtype: auto is float32, as not all processes are on machines that are fast at bfloat16")
    return config


def claim(workdir: Path, experiment: Experiment) -> None:
    """Makes `workdir` the folder of this configuration, or checks that it is; keeps vocabulary and checksums in it.

    A folder without a checkpoint holds nothing that another configuration could spoil. Raises WorkdirError with what
    differs: fields, the vocabulary or the data set.
    """
    path = workdir / CONFIG
    suffix, vocabulary = kept_vocabulary(experiment.config)
    checksums = experiment.dataset.path / CHECKSUMS
    if any((workdir / "checkpoints").glob("*")):
        if not path.exists():
            raise WorkdirError(f"{workdir} holds checkpoints but no {CONFIG}; choose another --workdir")
        saved = load_config(path)
        changes = _changes(experiment.config.to_dict(), saved, workdir)
        longer = [change for change in changes if change.startswith(LENGTH)]
        if longer:
            changes = [change for change in changes if change not in longer]
            changes += filter(None, [refused_extension(workdir, experiment, saved)])
        differs = []
        for copy in workdir.glob("vocabulary.*"):
            if copy.suffix != suffix or copy.read_bytes().strip() != vocabulary.strip():
                hint = f"; to go on with that, --config.tokenizer.path={copy}"
                differs.append((vocabulary_file(experiment.config), copy, hint))
        copy = workdir / CHECKSUMS
        if copy.exists() and checksums.exists() and copy.read_bytes() != checksums.read_bytes():
            differs.append((checksums, copy, ""))
        negatives, copy = _negatives(experiment.config), workdir / NEGATIVES
        if negatives and copy.exists() and _lists(negatives) != _lists(copy):
            differs.append((negatives, copy, "; the hard negatives were mined anew"))
        changes += [
            f"{original} differs from what the run began with, {copy.name}{hint}" for original, copy, hint in differs
        ]
        if changes:
            raise WorkdirError(
                f"{workdir} holds a run of another configuration; choose another --workdir or go back to:\n  "
                + "\n  ".join(changes)
            )
        if longer:
            for name in LENGTH:
                field = name.rpartition(".")[2]
                saved.train[field] = experiment.config.train[field]
            save_config(saved, path)
        return
    if (workdir / "dataset_info.json").exists() or (path.exists() and "train" not in load_config(path)):
        raise WorkdirError(f"{workdir} holds something else than a run; choose another --workdir")
    path.unlink(missing_ok=True)  # until all is in place
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_vocabulary(workdir, suffix, vocabulary)
    (workdir / CHECKSUMS).unlink(missing_ok=True)
    if checksums.exists():  # sets of other tools have none
        shutil.copyfile(checksums, workdir / CHECKSUMS)
    (workdir / NEGATIVES).unlink(missing_ok=True)
    if negatives := _negatives(experiment.config):
        shutil.copyfile(negatives, workdir / NEGATIVES)
    save_config(experiment.config, path)


def _negatives(config: ConfigDict) -> Path | None:
    """The description of the lists of config.data.negatives; None without."""
    folder = config.data.negatives.folder
    return to_path(folder) / NEGATIVES if folder else None


def _lists(path: Path) -> Any:
    """Checksums of the lists that a description is of; None where it is missing."""
    return untrusted.read_object(path).get("files") if path.is_file() else None


def _changes(config: dict[str, Any], saved: ConfigDict, workdir: Path) -> list[str]:
    """Fields that keep a run with the configuration `saved` from continuing with `config`, one line each."""
    saved_fields = saved.to_dict()
    refused, younger = [], []
    free = (*FREE_TO_CHANGE, *(f"config.model.{name}." for name in younger_models(saved, config)))
    for change in differences(config, complete(saved, ConfigDict(config)).to_dict()):
        if change.name.startswith(free) and not change.name.startswith(SELECTING):
            continue
        saved_value = _value(saved_fields, change.name)
        if saved_value is ABSENT and not SWITCHES.match(change.name):
            younger.append(f"{change.name}: {change.ours!r}")
        elif change.ours is not ABSENT or saved_value:  # a field that is no more, and was off, has changed nothing
            refused.append(str(change))
    if younger:
        given = ", ".join(younger)
        log.info("%s: this run is older than some fields, which are taken as --config gives them: %s", workdir, given)
    return refused


def younger_models(saved: ConfigDict, config: Mapping[str, Any]) -> set[str]:
    """Sections of config.model that the configuration of a run does not have: of models that are younger than it."""
    had = saved.get("model", {})
    return {name for name, value in config["model"].items() if isinstance(value, dict | ConfigDict) and name not in had}


def _value(config: dict[str, Any], name: str) -> Any:
    """The value of config.NAME in a configuration; ABSENT when it has none."""
    value: Any = config
    for part in name.split(".")[1:]:
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def _keep_vocabulary(workdir: Path, suffix: str, contents: bytes) -> None:
    for old in workdir.glob("vocabulary.*"):
        old.unlink()
    if suffix:  # a run on stored vectors may have none
        (workdir / f"vocabulary{suffix}").write_bytes(contents)


def adopt(workdir: Path, config: ConfigDict | FrozenConfigDict) -> None:
    """Makes `workdir` the folder of a model that was trained elsewhere: its configuration and its vocabulary.

    Raises WorkdirError for a folder that has checkpoints.
    """
    if any((workdir / "checkpoints").glob("*")):
        raise WorkdirError(f"{workdir} holds checkpoints already; choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_vocabulary(workdir, *kept_vocabulary(config))
    save_config(config, workdir / CONFIG)


def trained_config(workdir: Path, user_config: ConfigDict | None = None) -> ConfigDict:
    """The configuration of the run in `workdir`, its vocabulary being the one kept there.

    A run may name modules outside shnet_jax only where `user_config` names them too (`registry.check_known`), as the
    folder may be somebody else's. Raises WorkdirError or ValueError.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise WorkdirError(f"{workdir}: no {CONFIG}; not the work folder of a training run")
    vocabulary = next(workdir.glob("vocabulary.*"), None)
    config = load_config(path)
    without = (_value(config.to_dict(), f"config.text.{name}") for name in ("tower", "vocab_size"))
    if vocabulary is None and tuple(without) != (VECTORS, 0):
        raise WorkdirError(f"{workdir}: no vocabulary file; was the folder copied whole?")
    registry.check_known(_modules(path, config), str(path), [] if user_config is None else _modules(path, user_config))
    if vocabulary is not None:
        config.tokenizer.path = str(untrusted.inside(workdir, vocabulary.name))
    return config


def _modules(path: Path, config: ConfigDict) -> list[str]:
    """The modules that a configuration names: model and text tower; names of losses cannot have dots."""
    for section in ("model", "text", "tokenizer", "data", "eval", "loss", "optim"):
        # A run of an older version may lack some.
        value = config.get(section, None if section in ("model", "text", "tokenizer") else ConfigDict())
        if not isinstance(value, ConfigDict):
            raise WorkdirError(f"{path}: {section} is {value!r:.80}, expected a section; not of a run")
    names = [config.model.get("name"), config.text.get("tower")]
    if not all(isinstance(name, str) for name in names):
        raise WorkdirError(f"{path}: model.name and text.tower are {names!r:.200}, expected names")
    return names


def save_config(config: ConfigDict | FrozenConfigDict, path: Path) -> None:
    """The configuration as JSON, whole or not at all."""
    write_text(path, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def load_config(path: Path) -> ConfigDict:
    """A configuration saved by `save_config`. Raises WorkdirError for a file that is none."""
    try:
        return ConfigDict(_tuples(untrusted.read_object(path)))
    except (TypeError, ValueError, AttributeError) as error:  # also of names that a field cannot have
        raise WorkdirError(f"{path}: not the JSON of a configuration ({error})") from None


BEFORE = {
    "loss.pairs.dtype": "float32",
    "loss.sigmoid.reduction": "queries",
    "model.activation_dtype": "float32",
    "model.align.vectors_gain": 1.0,
    "optim.name": "adamw",
}
"""Values of these fields for runs that are older than they are; other younger fields were off."""


def complete(saved: ConfigDict, like: ConfigDict, prefix: str = "") -> ConfigDict:
    """The configuration of a run, with the fields of `like` that are younger than it as if it had had them.

    A younger field asks for something that was not done: it becomes False, 0, "" or (), or what BEFORE says.
    """
    filled = ConfigDict(saved.to_dict())
    for name, value in like.items():
        if isinstance(value, ConfigDict) and not isinstance(filled.get(name, value), ConfigDict):
            raise WorkdirError(f"the configuration of the run has {filled[name]!r:.80} as {name}, expected a section")
        if isinstance(value, ConfigDict):
            filled[name] = complete(filled.get(name, ConfigDict()), value, f"{prefix}{name}.")
        elif name not in filled:
            filled[name] = BEFORE.get(prefix + name, type(value)())
    return filled


def _tuples(section: dict[str, Any]) -> dict[str, Any]:
    """A section as `save_config` was given it: JSON has lists in place of tuples."""

    def tuples(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else _tuples(value) if isinstance(value, dict) else value

    return {key: tuples(value) for key, value in section.items()}


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
"""Stands for the value of a field that a configuration does not have."""


class Difference(NamedTuple):
    """A field, as "config.model.dim", that two configurations have different values of."""

    name: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.ours!r}, there {self.theirs!r}"


def differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "config") -> list[Difference]:
    """Fields in which two configurations differ, in order of their names."""
    differing = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b, name = ours.get(key, ABSENT), theirs.get(key, ABSENT), f"{prefix}.{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            differing += differences(a, b, name)
        elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            differing.append(Difference(name, a, b))
    return differing
