"""`--mode=convert`: weights of the published PyTorch code in, our weights out as safetensors and in again."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError

from shnet_jax.data import wordpiece
from shnet_jax.data.tokenise import load_tokenizer
from shnet_jax.experiment import settle_dtypes
from shnet_jax.interop import bert_weights
from shnet_jax.interop.published import open_published
from shnet_jax.interop.weights_file import WEIGHTS, read_weights, write_weights
from shnet_jax.observe.files import disk_faults, sole_writer
from shnet_jax.plan import planned_run
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.workdir import CONFIG, WorkdirError, adopt, complete, trained_config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model without data: complete configuration, {"params", "batch_stats"} and their training step."""

    config: ConfigDict
    variables: dict[str, Any]
    step: int


def convert(config: ConfigDict, workdir: str | Path) -> None:
    """Makes `workdir` a run from config.convert.source, or the folder config.convert.to from the run in `workdir`.

    Raises ValueError, FileNotFoundError, WorkdirError or CheckpointError with what does not fit.
    """
    workdir, source, to = Path(workdir), config.convert.source, config.convert.to
    if bool(source) == bool(to):
        raise ValueError(
            "give one: --config.convert.source=FILE_OR_FOLDER becomes the run in --workdir, "
            "--config.convert.to=FOLDER is made from it"
        )
    if to:
        model = load_run(workdir, config.eval.checkpoint, config)
        write_folder(Path(to), model)
        print(f"{Path(to) / WEIGHTS}: {describe(model)}, from {workdir}")
        return
    model = load_folder(source, config) if Path(source).is_dir() else load_published(config, source)
    write_run(workdir, model)
    print(
        f"{workdir}: {describe(model)}, from {source}\n"
        f"shnet eval --workdir={workdir} --config.data.dir=...  evaluates it"
    )


def load_published(config: ConfigDict, path: str | Path) -> Model:
    """The model in a checkpoint of the released PyTorch code.

    What shapes and options do not tell is taken from `config`: the vocabulary, the attention heads, how data is read.
    """
    config = ConfigDict(config.to_dict())
    if config.text.weights and not config.tokenizer.path:  # of a folder only its vocabulary is needed
        config.tokenizer.path = str(wordpiece.find_vocabulary(bert_weights.find_folder(config.text.weights)))
    config.tokenizer.kind = "wordpiece"
    settle_dtypes(config)
    published = open_published(path)
    known = published.fields()
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    flat = {field: value for field, value in flat.items() if field in known}
    if strange := sorted(known.keys() - flat.keys()):
        raise ValueError(f"{path} needs fields that --config does not have, {', '.join(strange)}: give its own model's")
    # As the type that the field has, since options are often whole numbers where ours are not.
    known = {field: type(flat[field])(value) for field, value in known.items()}
    for field, value in known.items():
        if value != flat[field]:
            log.info("%s: config.%s becomes %r (--config: %r)", path, field, value, flat[field])
    config.update_from_flattened_dict(known)
    if config.text.width % config.text.heads:
        raise ValueError(f"config.text.heads is {config.text.heads}; it does not divide the width {config.text.width}")
    _check_vocabulary(config, path)
    variables = published.variables(_expected(config))
    return Model(config, variables, published.step)


def load_run(workdir: str | Path, checkpoint: str = "best", own: ConfigDict | None = None) -> Model:
    """The model in a work folder; checkpoint: best | last. Where averaged weights were kept, they are returned.

    own: the user's configuration; see `workdir.trained_config`. It supplies fields that were added after the run.
    """
    workdir = Path(workdir)
    config = _trained(workdir, own)
    checkpoints = Checkpoints(workdir)
    step = checkpoints.step(checkpoint)
    if step is None:
        raise CheckpointError(f"{workdir}: no checkpoint in {checkpoints.folder}")
    averaged = config.optim.ema > 0
    like = checkpoints.abstract_variables(step, averaged=averaged)
    variables = checkpoints.restore_variables(step, like, averaged=averaged, on_host=True)
    checkpoints.close()
    config.optim.ema, config.text.weights = 0.0, ""  # already part of the restored weights
    return Model(config, variables, step)


def _trained(folder: Path, user_config: ConfigDict | None) -> ConfigDict:
    config = trained_config(folder, user_config)
    return config if user_config is None else complete(config, user_config)


def load_folder(folder: str | Path, own: ConfigDict | None = None) -> Model:
    """The model in a folder of `write_folder`; own as for `load_run`.

    Raises ValueError naming each array that the weights have and the configuration has not, or the other way round.
    """
    folder = Path(folder)
    config = _trained(folder, own)
    config.text.weights = ""  # they are in the folder
    variables, step = read_weights(folder / WEIGHTS)
    given, expected = (_ranks(tree) for tree in (variables, _expected(config)))
    if given != expected:
        wrong = [
            f"{name}: axes {given.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
            for name in sorted(given.keys() | expected.keys())
            if given.get(name) != expected.get(name)
        ]
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it:\n  " + "\n  ".join(wrong[:40]))
    return Model(config, variables, step)


def write_run(workdir: Path, model: Model) -> None:
    """Writes a work folder that --mode=eval takes.

    Raises WorkdirError for one that has checkpoints, FolderInUse for one that another process writes to.
    """
    with sole_writer(workdir):
        adopt(workdir, model.config)
        with closing(Checkpoints(workdir, keep=1)) as checkpoints:
            variables = jax.tree.map(jax.numpy.asarray, model.variables)
            checkpoints.save_variables(model.step, variables, {"converted": True})


def write_folder(
    folder: Path, model: Model, option: str = "--config.convert.to", add: Callable[[Path], None] | None = None
) -> None:
    """Writes model.safetensors, config.json and the vocabulary to a new folder atomically.

    option: the flag that named the folder, for messages. add: writes more files into it, before it has its name.
    """
    temporary = folder.with_name(f".{folder.name}.incomplete")  # hidden, so that no file of a user has this name
    with sole_writer(folder.parent, f".{folder.name}.lock"), disk_faults(folder, SafetensorError):
        if folder.exists():
            raise WorkdirError(f"{folder} exists already; choose another {option}")
        shutil.rmtree(temporary, ignore_errors=True)
        adopt(temporary, model.config)
        write_weights(temporary / WEIGHTS, model.variables, model.step)
        if add is not None:
            add(temporary)
        temporary.rename(folder)


def _check_vocabulary(config: ConfigDict, path: str | Path) -> None:
    if not config.tokenizer.path:
        raise ValueError(
            f"{path} has no vocabulary: give the vocab.txt of its BERT (bert-base-uncased in the released code), "
            "--config.tokenizer.path=vocab.txt"
        )
    pieces = load_tokenizer(config).vocab_size
    if pieces != config.text.vocab_size:
        raise ValueError(
            f"{path}: its BERT has {config.text.vocab_size} tokens, {config.tokenizer.path} {pieces}: "
            "not the vocabulary that it was trained with"
        )


def _expected(config: ConfigDict) -> dict[str, Any]:
    """Shapes of the model of a configuration; those of image features are as config.plan says."""
    config = ConfigDict(config.to_dict())
    config.data.dir = ""
    return planned_run.variable_shapes(planned_run.describe(config))


def _ranks(tree: dict[str, Any]) -> dict[str, int]:
    """Number of axes of each array by name; lengths also depend on the features of a data set."""
    return {name: len(leaf.shape) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def describe(model: Model) -> str:
    """Name, size and step of a model in a few words."""
    count = sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))
    return f"{model.config.model.name}, {count:,} parameters of step {model.step}"
