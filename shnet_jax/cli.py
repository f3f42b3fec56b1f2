"""Command line: `shnet MODE FLAGS`, also `python -m shnet_jax MODE FLAGS` and `python main.py --mode=MODE FLAGS`."""

from __future__ import annotations

import ast
import difflib
import faulthandler
import importlib
import logging as python_logging
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import shnet_jax
from shnet_jax import bundled
from shnet_jax.observe.terminal import make_output_safe
from shnet_jax.paths import expand, to_places
from shnet_jax.storage import is_url

log = python_logging.getLogger(__name__)


class Mode(NamedTuple):
    """A mode of the command line.

    target: "module:function", called with the configuration and the work folder.
    configured: whether it needs `--config`; other modes take the configuration of the run in `--workdir`.
    own_flags: flags that belong to this mode alone; each is an argument of the function.
    """

    target: str
    help: str
    example: str
    configured: bool = False
    own_flags: tuple[str, ...] = ()


MODES = {
    "train": Mode(
        "shnet_jax.modes.train:train",
        "train a model, or continue a run",
        "--config=demo --workdir=runs/one",
        configured=True,
    ),
    "eval": Mode(
        "shnet_jax.modes.evaluate:evaluate",
        "evaluate a checkpoint, or an ensemble",
        "--workdir=runs/one --config.eval.split=test",
        own_flags=("card",),
    ),
    "study": Mode(
        "shnet_jax.modes.study:study",
        "train and compare the arms of a configuration",
        "--config=demo --workdir=runs/demo",
        configured=True,
    ),
    "search": Mode(
        "shnet_jax.modes.search:search",
        "find images by words, captions by an image",
        "--workdir=runs/one --query='a red star above the sea'",
        own_flags=("query", "query_file", "query_vectors", "image_id", "photo", "top_k", "device"),
    ),
    "serve": Mode(
        "shnet_jax.modes.serve:serve",
        "search in the browser, and as JSON",
        "--workdir=runs/one --config.page.pictures=photos",
        own_flags=("host", "port", "device"),
    ),
    "page": Mode(
        "shnet_jax.modes.page:page",
        "write an HTML page: hits, failures, highlighting",
        "--workdir=runs/one --config.page.pictures=photos",
    ),
    "photos": Mode(
        "shnet_jax.modes.photos:photos",
        "search your own photographs by words or a photo",
        "MY_PHOTOS --out=runs/photos --query='a dog on a beach'",
        own_flags=("folder", "model", "captions", "head", "query", "photo", "top_k", "device", "overwrite"),
    ),
    "embed": Mode(
        "shnet_jax.modes.embed:embed",
        "write the vectors of a split",
        "--workdir=runs/one --config.search.split=test",
    ),
    "mine": Mode(
        "shnet_jax.modes.mine:mine",
        "find hard negatives in the training split, for data.negatives",
        "--workdir=runs/one",
    ),
    "cross": Mode(
        "shnet_jax.modes.cross:cross",
        "evaluate every run on every data set",
        "--workdir=runs/cross --config.cross.runs=runs/a,runs/b --config.cross.data_dirs=sets/a,sets/b",
    ),
    "plan": Mode(
        "shnet_jax.modes.plan:plan",
        "time and memory of a step, on devices you do not have yet",
        "--config=base --workdir=runs/plan --target=tpu:v5e:4x4",
        configured=True,
        own_flags=("target",),
    ),
    "scale": Mode(
        "shnet_jax.modes.scale:scale",
        "measure the step over devices, batches, losses, precisions",
        "--config=scaling --workdir=runs/scaling",
        configured=True,
    ),
    "convert": Mode(
        "shnet_jax.modes.convert:convert",
        "import published weights, or export a run",
        "--workdir=runs/one --config.convert.to=exported",
    ),
    "export": Mode(
        "shnet_jax.modes.export:export_run",
        "write a folder to publish: weights, StableHLO, ONNX, model card",
        "--workdir=runs/one --to=published",
        own_flags=("to", "license", "onnx"),
    ),
}
DATA = ("data", "import features and captions, check a data set", "photos_or_features")

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration: a bundled name or a file, NAME:VARIANT. Any field is a flag: --config.train.epochs=4.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, or a URL such as s3://BUCKET/FOLDER.")
MODE = flags.DEFINE_enum("mode", "train", [*MODES], "; ".join(f"{name}: {mode.help}" for name, mode in MODES.items()))
flags.DEFINE_string("target", "", "Devices that plan compiles for: tpu:v5e:4x4, tpu:v4:2x2x2, gpu or cpu:8.")
flags.DEFINE_string("query", "", "Words that search looks for.")
flags.DEFINE_string("query_file", "", "File of queries, one a line.")
flags.DEFINE_string("query_vectors", "", "Vectors of the queries, an .npy file, for text.tower=vectors.")
flags.DEFINE_string("folder", "", "Folder of photographs, the first argument of photos.")
flags.DEFINE_string(
    "model",
    "",
    "CLIP or SigLIP of photos, folder or hub name; default: openai/clip-vit-base-patch32 (151 million weights; MIT).",
)
flags.DEFINE_string("captions", "", "Captions of some of the photographs of photos: FILE, or SPLIT=FILE,SPLIT=FILE.")
flags.DEFINE_bool("head", False, "Whether photos trains a head on the captions, and compares it with the model alone.")
flags.DEFINE_string("photo", "", "Photograph to which photos and search find similar ones; it need not be there.")
flags.DEFINE_string("device", "", "Device of PyTorch for photographs: cpu, cuda, ...; default: a GPU if there is one.")
flags.DEFINE_bool("overwrite", False, "Whether photos makes the run again, of other photographs or another model.")
flags.DEFINE_string("image_id", "", "Image of the split, to search for its captions and images like it.")
flags.DEFINE_integer("top_k", 10, "Results of search for each query.")
flags.DEFINE_bool("card", False, "Whether eval prints the protocol cards too, which its files always have.")
flags.DEFINE_string("host", "127.0.0.1", "Address that serve listens at; the default is for this machine alone.")
flags.DEFINE_integer("port", 8765, "Port of serve; 0: a free one.")
flags.DEFINE_string("to", "", "Folder that export makes; it may not exist yet.")
flags.DEFINE_string(
    "license", "", "Licence of the weights for the card of export, such as apache-2.0; else to fill in."
)
flags.DEFINE_bool("onnx", False, "Whether export also writes the text and image sides as ONNX; extra: onnx.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join a job of several processes, of the modes train and study (each reads and computes its part of every batch), "
    "eval, embed and mine (each encodes, scores or ranks a part of the gallery). On a TPU pod, under Slurm and on "
    "Kubernetes the next three flags are found.",
)
COORDINATOR = flags.DEFINE_string("coordinator_address", "", "host:port of process 0, the same in all processes.")
PROCESSES = flags.DEFINE_integer("process_count", 0, "Processes of the job.")
PROCESS = flags.DEFINE_integer("process_id", -1, "This process, 0 to process_count - 1.")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "Seconds without a sign of life after which a process counts as dead and all others end."
)
START = flags.DEFINE_integer(
    "start_seconds",
    900,
    "Seconds that a process waits for all others to join: machines of a job do not start together.",
)

PATH_FLAGS = ("workdir", "query_file", "query_vectors", "folder", "model", "photo", "to")
PATH_LISTS = ("config.eval.ensemble", "config.cross.runs", "config.cross.data_dirs")
NAME_LISTS = ("config.train.log_to", "config.train.log_tags")
DATA_SETS = (("data", "dir"), ("cross", "data_dirs"))
"""Fields that keep a URL: the data set is read through a cache of its own."""
RUNS = ("train", "study", "scale")
"""Modes whose work folder in object storage no other command of these may write to meanwhile."""
SHARED = ("train", "study", "eval", "embed", "mine")
"""Modes whose work several processes share."""
END_SECONDS = 60
"""Time that a failed command has to end; its process is then killed, and the stacks of its threads are printed."""
ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")
"""Device files of TPUs and of NVIDIA's and AMD's GPUs (under WSL: dxg)."""


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command of `argv` (the process's by default) and exits with its status."""
    make_output_safe()
    bundled.make_importable()
    program, *arguments = sys.argv if argv is None else argv
    first = arguments[0] if arguments else "--help"
    if first == "--version":
        print(f"shnet_jax {shnet_jax.__version__}")
        sys.exit(0)
    if first in ("help", "-h", "--help"):
        print(overview())
        sys.exit(0)
    if first == "data":
        sys.argv = ["shnet data", *arguments[1:]]
        runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
        sys.exit(0)
    if first in MODES:
        if {"-h", "--help"} & {*arguments}:
            print(mode_help(first))
            sys.exit(0)
        arguments[0] = f"--mode={first}"
        if first == "photos":
            arguments = _of_photos(arguments)
    elif not first.startswith("-"):
        near = difflib.get_close_matches(first, [*MODES, "data"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"modes: {', '.join([*MODES, 'data'])}"
        _fail(f"{first}: no such mode; {hint}", 2)
    _choose_platform()
    try:
        app.run(main, argv=[program, *arguments], flags_parser=parse_flags)
    except BaseException as ended:
        if not (isinstance(ended, SystemExit) and ended.code in (None, 0)) and sys.__stderr__ is not None:
            # Python joins all threads when it ends, and one of a library may wait for ever after a fault.
            faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=sys.__stderr__)
        raise
    raise AssertionError("app.run exits")


def _of_photos(arguments: Sequence[str]) -> list[str]:
    """The arguments of `shnet photos [FOLDER] --out=RUN` by the names of the flags."""
    mode, *rest = (re.sub("^--?out(?==|$)", "--workdir", argument) for argument in arguments)
    if rest and not rest[0].startswith("-"):
        rest[0] = f"--folder={rest[0]}"
    return [mode, *rest]


def overview() -> str:
    """The modes with one example each, for `shnet` and `shnet --help`."""
    modes = [(name, mode.help, mode.example) for name, mode in MODES.items()] + [DATA]
    lines = [f"  {name:9}{text}\n           shnet {name} {example}" for name, text, example in modes]
    return "\n".join(
        [
            "Image-sentence retrieval from precomputed features.",
            "",
            "usage: shnet MODE --workdir=FOLDER [--config=NAME_OR_FILE] [--config.FIELD=VALUE ...]",
            "",
            *lines,
            "",
            "shnet MODE --help: the flags of a mode. shnet --version. shnet train --helpfull: every flag.",
            "--config takes a bundled name (demo, base, ...) or a file of yours. Modes that work on a finished run",
            "read its own. Every field of a configuration is a flag; configs/base.py documents them.",
        ]
    )


def mode_help(name: str) -> str:
    """The flags of a mode, with its example."""
    mode = MODES[name]
    shown = ["config", "workdir", *mode.own_flags]
    if name in SHARED:
        shown += [
            "distributed",
            "coordinator_address",
            "process_count",
            "process_id",
            "heartbeat_seconds",
            "start_seconds",
        ]
    lines = [f"  --{flag:21}{flags.FLAGS[flag].help}" for flag in shown]
    if name == "photos":  # see `_of_photos`; it takes no URL
        lines[1] = f"  --{'out':21}Folder of the run."
    needed = "needed" if mode.configured else "by default the configuration of the run in --workdir"
    return "\n".join(
        [
            f"shnet {name}: {mode.help}",
            "",
            f"  shnet {name} {mode.example}",
            "",
            *lines,
            "",
            f"--config: {needed}. Fields of a configuration: {bundled.CONFIGS / 'base.py'}",
        ]
    )


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the command line; a mistake in it is one line and exit status 2."""
    try:
        argv = _with_config([_with_paths(argument) for argument in _joined(argv)])
        rest = flags.FLAGS(argv)
        if not WORKDIR.value:
            _fail(
                f"--{'out' if MODE.value == 'photos' else 'workdir'} is missing or empty: give the folder of the run", 2
            )
        for name, mode in MODES.items():
            for flag in mode.own_flags:
                if flags.FLAGS[flag].present and flag not in MODES[MODE.value].own_flags:
                    _fail(f"--{flag} belongs to --mode={name}, not to --mode={MODE.value}", 2)
        _expand_paths(CONFIG.value)  # ml_collections reports a file that it could not open only when a field is read
    except (flags.Error, OSError, ValueError) as error:
        _fail(" ".join(str(error).split()), 2)
    except (AttributeError, KeyError, TypeError):
        unknown = _unknown_field(argv)
        if unknown is None:  # a fault in the configuration file: its author wants to see where
            raise
        _fail(unknown, 2)
    if len(rest) > 1:
        _fail(f"unexpected arguments: {' '.join(rest[1:])}", 2)
    return rest


def _joined(argv: Sequence[str]) -> list[str]:
    """The command line with `--config X`, `--workdir X` and `--mode X` as one argument each."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1].lstrip("-") in ("config", "workdir", "mode") and joined[-1].startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _with_config(argv: list[str]) -> list[str]:
    """The command line with the file of a bundled configuration, or of the run in --workdir where it names none.

    It comes first, as ml_collections knows the fields only after it. Raises ValueError when there is no configuration.
    """
    given = {argument.partition("=")[0].lstrip("-"): argument.partition("=")[2] for argument in argv[1:]}
    name = given.get("mode", MODE.default)
    rest = [argument for argument in argv[1:] if not re.match("--?config=", argument)]
    if "config" in given:
        path = bundled.config_path(given["config"])
        if ":" in path:
            bundled.get_config(given["config"])  # raises for an unknown variant; ml_collections would add its stack
    elif given.get("config.convert.source"):  # its file or folder says what the model is
        path = bundled.config_path("base")
    elif name == "photos" and (_overwrites(rest) or not (Path(given.get("workdir", "")) / "config.json").is_file()):
        path = bundled.config_path("dual")
    elif not given.get("workdir") or name not in MODES:
        return argv  # absl, or the caller, says what is missing
    elif MODES[name].configured:
        raise ValueError(f"--config is missing: a bundled name or a file, as in: shnet {name} {MODES[name].example}")
    else:
        from shnet_jax import stored_config

        # An evaluation of several runs has a folder of its own for results, and is configured as the first of them.
        several = given.get("config.eval.ensemble") or given.get("config.cross.runs")
        workdir = _first_path(several) if several else given["workdir"]
        workdir = _local(workdir) if is_url(workdir) else workdir
        stored_config.get_config(workdir)  # raises for a folder without a run
        path = f"{stored_config.__file__}:{workdir}"
    return [argv[0], f"--config={path}", *rest]


def _overwrites(arguments: Sequence[str]) -> bool:
    """Whether --overwrite is on: photos then starts again and keeps nothing of the existing run."""
    given = [re.fullmatch("--?(no)?overwrite(?:=(.*))?", argument) for argument in arguments]
    matches = [match for match in given if match]
    return bool(matches) and not matches[-1][1] and (matches[-1][2] or "true").lower() in ("true", "t", "1")


def _first_path(text: str) -> str:
    """The first of the paths that a flag of PATH_LISTS has, as a tuple or list in Python's notation."""
    try:
        paths = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        paths = ()
    if not isinstance(paths, tuple | list) or not paths or not isinstance(paths[0], str):
        raise ValueError(f"expected work folders, as runs/a,runs/b or ('runs/a', 'runs/b'); found {text}")
    return paths[0]


def _with_paths(argument: str) -> str:
    """The argument with `~` as the home folder, and a list by commas as the tuple that its flag expects."""
    name, equals, value = argument.partition("=")
    flag = name.lstrip("-")
    if flag in PATH_FLAGS:
        value = _local(value) if is_url(value) else expand(value)
    elif flag in PATH_LISTS and value and value[0] not in "([\"'":
        value = repr(tuple(to_places(value)))
    elif flag in NAME_LISTS and value and value[0] not in "([\"'":
        value = repr(tuple(name.strip() for name in value.split(",")))
    return f"{name}{equals}{value}"


def _local(url: str) -> str:
    """The local copy of a folder or file in object storage."""
    from shnet_jax import mirror  # late, as it imports JAX

    return str(mirror.local(url))


def _expand_paths(config: ConfigDict, section: str = "") -> None:
    """`~` as the home folder in every field, as no other text begins with it, and the local copy of a URL.

    Data sets keep their URL: they are read through a cache, and the run keeps the field.
    """
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_paths(value, name)
            continue
        parts = value if isinstance(value, tuple) else (value,)
        places = tuple(_place(part, (section, name) in DATA_SETS) for part in parts)
        if places != parts:
            config[name] = places if isinstance(value, tuple) else places[0]


def _place(value: Any, of_data_set: bool) -> Any:
    if isinstance(value, str) and value.startswith("~"):
        return expand(value)
    return _local(value) if isinstance(value, str) and not of_data_set and is_url(value) else value


def _unknown_field(argv: Sequence[str]) -> str | None:
    """Error message for the first --config.a.b that names no field; None when all of them do."""
    text = "\n".join(argv)
    files = re.findall(r"(?m)^--?config=(.*)$", text)
    try:
        config = bundled.get_config(files[-1]) if files else ConfigDict()
    except ValueError as error:
        return str(error)
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


def _choose_platform(root: Path = Path("/")) -> None:
    """Keeps JAX from looking for accelerators where Linux shows none: libtpu would, for seconds and with 10 lines.

    root: of the file system, for tests.
    """
    seen = [path for pattern in ACCELERATORS for path in root.glob(pattern.lstrip("/"))]
    if sys.platform == "linux" and not seen:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _unraisable(fault: Any) -> None:
    """Without what TensorStore's threads say after a write that failed, which is told once and as an error."""
    if str(fault.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(fault)


class _Plain(python_logging.Formatter):
    """Log lines as "12:04:31 text"; warnings say that they are."""

    def format(self, record: python_logging.LogRecord) -> str:
        level = "" if record.levelno < python_logging.WARNING else f"{record.levelname.lower()}: "
        text = f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def main(argv: Sequence[str]) -> None:
    """Runs the mode; faults that a user can mend are printed as one message, without a traceback (-v=1 shows it)."""
    del argv
    debug = logging.get_verbosity() >= logging.DEBUG
    if not debug:
        logging.set_verbosity(logging.WARNING)  # orbax and TFDS report every step at INFO
        logging.get_absl_handler().setFormatter(_Plain())
        sys.unraisablehook = _unraisable
    python_logging.getLogger("shnet_jax").setLevel(python_logging.INFO)
    # Late, so that --help and mistakes in flags are quick.
    from shnet_jax import mirror
    from shnet_jax.observe.banner import banner, unused_accelerator
    from shnet_jax.observe.files import FolderInUse, describe
    from shnet_jax.parallel import hosts
    from shnet_jax.training.checkpoint import CheckpointError
    from shnet_jax.training.loop import NonFiniteLoss
    from shnet_jax.training.workdir import WorkdirError

    mode = MODES[MODE.value]
    module, function = mode.target.split(":")
    call: Callable[..., Any] = getattr(importlib.import_module(module), function)
    try:
        if DISTRIBUTED.value and MODE.value not in SHARED:
            raise ValueError(f"--distributed is for the modes {', '.join(SHARED)}; --mode is {MODE.value}")
        if not DISTRIBUTED.value and (COORDINATOR.value or PROCESSES.value or PROCESS.value >= 0):
            raise ValueError("--coordinator_address, --process_count and --process_id belong to --distributed")
        if DISTRIBUTED.value:
            hosts.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value, START.value)
        if hosts.is_first():
            log.info("%s", banner(MODE.value, str(WORKDIR.value)))
            if warning := unused_accelerator():
                log.warning("%s", warning)
        if MODE.value == "photos" and mirror.is_copy(str(WORKDIR.value)):
            raise ValueError("photos keeps paths of this machine in its folder: --out takes a local folder, not a URL")
        with mirror.working_in(str(WORKDIR.value), alone=MODE.value in RUNS) as folder:
            call(CONFIG.value, str(folder), **{flag: flags.FLAGS[flag].value for flag in mode.own_flags})
    except (ValueError, OSError, CheckpointError, FolderInUse, NonFiniteLoss, WorkdirError) as error:
        if debug:
            raise
        _fail(f"{describe(error) if isinstance(error, OSError) else error} (-v=1 shows where)", 1)
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
