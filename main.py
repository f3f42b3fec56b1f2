"""Flags of shnet_jax: `python main.py --mode=train --config=configs/demo.py --workdir=runs/demo`."""

import difflib
import inspect
import logging as python_logging
import os
import re
import runpy
import sys
from functools import partial
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from shnet_jax.observe.terminal import make_output_safe
from shnet_jax.paths import expand, to_paths

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, FILE or FILE:VARIANT; any field: --config.train.epochs=4."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, results.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "cross", "study", "plan", "scale", "convert", "embed", "search", "page"],
    "train (or continue) a model; eval a checkpoint or an ensemble; cross: evaluate every run on every data set; "
    "study: train and compare arms; plan: what a step will cost; "
    "scale: measure the step over devices, batches, loss strategies and precisions; convert: weights in or out; "
    "embed: write the vectors of a split; search it; page: one HTML file that shows what the model finds and what it "
    "looks at.",
)
TARGET = flags.DEFINE_string("target", "", "What --mode=plan compiles for, as tpu:v5e:4x4, tpu:v4:2x2x2, gpu or cpu:8.")
QUERY = flags.DEFINE_string("query", "", "What --mode=search looks for, in words.")
QUERY_FILE = flags.DEFINE_string("query_file", "", "The same from a file, one query a line.")
IMAGE_ID = flags.DEFINE_string("image_id", "", "An image of the split, to search for its captions and images like it.")
TOP_K = flags.DEFINE_integer("top_k", 10, "Results of --mode=search for each query.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join a job of several processes; on a TPU pod, under Slurm and on Kubernetes the next three are found.",
)
COORDINATOR = flags.DEFINE_string("coordinator_address", "", "host:port of process 0, the same in all processes.")
PROCESSES = flags.DEFINE_integer("process_count", 0, "Processes of the job.")
PROCESS = flags.DEFINE_integer("process_id", -1, "This process, 0 to process_count - 1.")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "Seconds without a sign of life after which a process counts as dead and all others end."
)
flags.mark_flags_as_required(["config", "workdir"])

PATH_FLAGS = ("config", "workdir", "query_file")
PATH_LISTS = ("config.eval.ensemble", "config.cross.runs", "config.cross.data_dirs")
OF_ONE_MODE = dict.fromkeys(("query", "query_file", "image_id", "top_k"), "search") | {"target": "plan"}


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line; a mistake in it is one line and exit status 2."""
    argv = [_with_paths(argument) for argument in argv]
    try:
        rest = flags.FLAGS(argv)
        if not WORKDIR.value:
            _fail("--workdir is empty: give the folder of the run", 2)
        for name, mode in OF_ONE_MODE.items():
            if flags.FLAGS[name].present and MODE.value != mode:
                _fail(f"--{name} belongs to --mode={mode}, not to --mode={MODE.value}", 2)
        _expand_paths(CONFIG.value)  # ml_collections tells of a file that it could not open when a field is read
    except (flags.Error, OSError) as error:
        _fail(_unknown_variant(argv) or " ".join(str(error).split()), 2)
    except (AttributeError, KeyError, TypeError):
        unknown = _unknown_field(argv)
        if unknown is None:  # a fault in the configuration file: its author wants to see where
            raise
        _fail(unknown, 2)
    if len(rest) > 1:
        _fail(f"unexpected arguments: {' '.join(rest[1:])}", 2)
    return rest


def _with_paths(argument: str) -> str:
    """The argument with `~` as the home folder, and a list of paths by commas as the tuple that its flag expects."""
    name, equals, value = argument.partition("=")
    flag = name.lstrip("-")
    if flag in PATH_FLAGS:
        value = expand(value)
        parts = value.split(":")
        with_colon = (":".join(parts[:count]) for count in range(2, len(parts) + 1))
        if flag == "config" and any(map(os.path.isfile, with_colon)):  # ml_collections takes the rest for a variant
            _fail(f"--config={value}: expected a path without ':'; copy the file, or call it by a relative path", 2)
    elif flag in PATH_LISTS and value and value[0] not in "([\"'":
        value = repr(tuple(map(str, to_paths(value))))
    return f"{name}{equals}{value}"


def _expand_paths(config: ConfigDict) -> None:
    """`~` as the home folder in every field: no other text begins with it."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_paths(value)
        elif isinstance(value, str) and value.startswith("~"):
            config[name] = expand(value)
        elif isinstance(value, tuple) and any(isinstance(part, str) and part.startswith("~") for part in value):
            config[name] = tuple(expand(part) if isinstance(part, str) else part for part in value)


def _config_file(argv: list[str]) -> tuple[str, list[str]]:
    """The file of --config and the arguments of its get_config: [] or [VARIANT]; the file is "" without --config."""
    values = re.findall(r"(?m)^--?config[=\n](.*)$", "\n".join(argv))
    file, *variant = values[-1].split(":", 1) if values else [""]
    return file, variant


def _unknown_variant(argv: list[str]) -> str | None:
    """Error message for --config=FILE:VARIANT where FILE does not take that argument; None otherwise."""
    file, variant = _config_file(argv)
    if not variant or not os.path.isfile(file):
        return None
    get_config = runpy.run_path(file).get("get_config", str)
    if not inspect.signature(get_config).parameters:
        return f"--config={file}:{variant[0]}: {file} has no variants; expected --config={file}"
    try:
        get_config(*variant)
    except ValueError as error:
        return f"--config={file}: {error}"
    return None


def _unknown_field(argv: list[str]) -> str | None:
    """Error message for the first --config.a.b that names no field; None when all of them do."""
    text = "\n".join(argv)
    file, variant = _config_file(argv)
    found = runpy.run_path(file) if file else {"get_config": ConfigDict}
    if "get_config" not in found:
        return f"{file}: expected a configuration with a function get_config, found none"
    config = found["get_config"](*variant)
    for path in re.findall(r"(?m)^--?(?:no)?config\.([^=\n]+)", text):
        node = config
        for name in path.split("."):
            if not isinstance(node, ConfigDict):
                return f"--config.{path}: {name!r} is asked of a value, not of a section"
            if name not in node:
                near = difflib.get_close_matches(name, node.keys(), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(node.keys())}"
                return f"--config.{path}: no field {name!r}; {hint}"
            node = node[name]
    return None


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _unraisable(fault: Any) -> None:
    """Without what TensorStore's threads say after a write that failed, which is told once and as an error."""
    if str(fault.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(fault)


def main(argv: list[str]) -> None:
    """Runs the mode; faults that a user can mend are printed as one message, without a traceback (-v=1 shows it)."""
    del argv
    debug = logging.get_verbosity() >= logging.DEBUG
    if not debug:
        logging.set_verbosity(logging.WARNING)  # orbax and TFDS report every step at INFO
        sys.unraisablehook = _unraisable
    python_logging.getLogger("shnet_jax").setLevel(python_logging.INFO)
    # Late, so that --help and mistakes in flags are quick.
    from shnet_jax.modes.convert import convert
    from shnet_jax.modes.cross import cross
    from shnet_jax.modes.embed import embed
    from shnet_jax.modes.evaluate import evaluate
    from shnet_jax.modes.page import page
    from shnet_jax.modes.plan import plan
    from shnet_jax.modes.scale import scale
    from shnet_jax.modes.search import search
    from shnet_jax.modes.study import study
    from shnet_jax.modes.train import train
    from shnet_jax.observe.files import FolderInUse, describe
    from shnet_jax.parallel import hosts
    from shnet_jax.train.checkpoint import CheckpointError
    from shnet_jax.train.loop import NonFiniteLoss
    from shnet_jax.train.workdir import WorkdirError

    modes = {"train": train, "eval": evaluate, "cross": cross, "study": study, "scale": scale}
    modes |= {"convert": convert, "embed": embed, "page": page}
    look = partial(search, query=QUERY.value, query_file=QUERY_FILE.value, image_id=IMAGE_ID.value, top_k=TOP_K.value)
    run = (modes | {"plan": partial(plan, target=TARGET.value), "search": look})[MODE.value]
    try:
        if DISTRIBUTED.value and MODE.value not in ("train", "eval"):
            raise ValueError(f"--distributed is for the modes train and eval, --mode is {MODE.value}")
        if not DISTRIBUTED.value and (COORDINATOR.value or PROCESSES.value or PROCESS.value >= 0):
            raise ValueError("--coordinator_address, --process_count and --process_id belong to --distributed")
        if DISTRIBUTED.value:
            hosts.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value)
        run(CONFIG.value, str(WORKDIR.value))
    except (ValueError, OSError, CheckpointError, FolderInUse, NonFiniteLoss, WorkdirError) as error:
        if debug:
            raise
        _fail(f"{describe(error) if isinstance(error, OSError) else error} (-v=1 shows where)", 1)


if __name__ == "__main__":
    make_output_safe()
    app.run(main, flags_parser=parse_flags)
