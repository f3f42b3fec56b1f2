"""`shnet export`: a run as a folder to publish, with weights, vocabulary, StableHLO programs and a model card."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from shnet_jax.data.checksums import sha256
from shnet_jax.data.schema import FIELDS
from shnet_jax.data.tokenise import load_tokenizer
from shnet_jax.interop.weights_file import WEIGHTS
from shnet_jax.models.text import text_fields
from shnet_jax.modes import export_onnx, model_card
from shnet_jax.modes.convert import Model, describe, load_run, write_folder
from shnet_jax.modes.export_programs import PLATFORMS, SUFFIX, flatten, programs, signature, to_stablehlo
from shnet_jax.observe.files import write_json, write_text
from shnet_jax.observe.progress import waiting
from shnet_jax.ops.interaction import default_block
from shnet_jax.plan import planned_run
from shnet_jax.training.exported import FORMAT, PROGRAMS
from shnet_jax.training.workdir import CONFIG, WorkdirError, save_config

log = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
PRIVATE = (
    "data.dir",
    "data.negatives.folder",
    "eval.compare",
    "eval.cxc",
    "eval.eccv",
    "mine.folder",
    "page.pictures",
    "search.address",
    "search.embeddings",
    "text.weights",
    "tokenizer.path",
    "train.init_from",
)
"""Fields that are paths or addresses of this machine: they are empty in what is published."""


def export_run(config: ConfigDict, workdir: str | Path, to: str, license: str = "", onnx: bool = False) -> None:
    """Writes the folder `to` from the run in `workdir`: all of it, or nothing.

    Args:
      config: config.eval.checkpoint chooses the checkpoint; config.data.dir tells the shapes of fields, config.plan
        where there is no data set.
      to: the folder, which may not exist yet.
      license: of the weights, an identifier of the hub; "": a field of the card that is left to fill in.
      onnx: also writes the text side, and the image side where it can be, as ONNX.

    Raises:
      ValueError: no `to`, a data set that does not fit the run, a program or a text side that cannot be exported.
      WorkdirError, CheckpointError, FolderInUse: as `convert.load_run` and `convert.write_folder`.
    """
    if not to:
        raise ValueError("give the folder to be made: --to=FOLDER")
    check_serialisation()
    if onnx:
        export_onnx.check_packages()
    workdir, folder = Path(workdir), Path(to)
    if folder.exists():
        raise WorkdirError(f"{folder} exists already; choose another --to")
    model = load_run(workdir, config.eval.checkpoint, config)
    run = _described(model, config)
    weights = flatten(model.variables)
    made = programs(run, weights)
    serialised, signatures = {}, {}
    for name, program in made.items():
        with waiting(f"exporting the {name} program"):
            exported = to_stablehlo(run, program, weights)
            serialised[name + SUFFIX] = bytes(exported.serialize())
            signatures[name] = {"file": name + SUFFIX, **signature(program, exported)}
    files = export_onnx.onnx_files(run, weights) if onnx else {}
    serialised |= {name + export_onnx.SUFFIX: file.content for name, file in files.items()}
    of_onnx = {name: {"file": name + export_onnx.SUFFIX, **file.signature} for name, file in files.items()}
    about = model_card.About(model, run, workdir, license, _tokens(run), of_onnx)

    def add(temporary: Path) -> None:
        save_config(_public(model.config), temporary / CONFIG)
        for name, blob in serialised.items():
            (temporary / name).write_bytes(blob)
        write_json(temporary / PROGRAMS, _programs(run, signatures, about))
        write_text(temporary / model_card.CARD, model_card.render(about, _sums(temporary), signatures))
        lines = [f"{digest}  {name}\n" for name, (_, digest) in _sums(temporary).items()]
        write_text(temporary / SUMS, "".join(lines))

    write_folder(folder, model, "--to", add)
    print(f"{folder}: {describe(model)}, from {workdir}; {model_card.CARD} says what is left to fill in")


def check_serialisation() -> None:
    """Raises ValueError where the package that `jax.export` writes with is not installed."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ValueError("jax.export needs the package flatbuffers: pip install -e '.[export]'") from None


def _described(model: Model, config: ConfigDict) -> planned_run.PlannedRun:
    """The run with the shapes of its fields. Raises ValueError where the weights are of other shapes."""
    complete = ConfigDict(model.config.to_dict())
    complete.data.dir = config.data.dir
    complete.plan = config.plan
    complete.model.cmsei.block = complete.model.cmsei.block or default_block("tpu")  # programs for all platforms
    run = planned_run.describe(complete)
    actual, expected = flatten(model.variables), flatten(planned_run.variable_shapes(run))
    for name in sorted(actual.keys() | expected.keys()):
        pair = [list(side[name].shape) if name in side else "absent" for side in (actual, expected)]
        if pair[0] != pair[1]:
            where = config.data.dir or "config.plan"
            raise ValueError(
                f"the run does not fit the fields of {where}: {name} is {pair[0]}, expected {pair[1]}; give its data "
                "set, --config.data.dir=DIR"
            )
    return run


def _public(config: ConfigDict) -> ConfigDict:
    """The configuration without paths of this machine."""
    public = ConfigDict(config.to_dict())
    public.unlock()
    for name in PRIVATE:
        sections, _, field = name.rpartition(".")
        section: ConfigDict = functools.reduce(getattr, sections.split("."), public)
        section[field] = ""
    public.data.negatives.count = 0
    public.eval.ensemble = public.cross.runs = public.cross.data_dirs = ()
    public.convert.source = public.convert.to = ""
    return public


def _tokens(run: planned_run.PlannedRun) -> dict[str, Any]:
    """How captions become tokens: kind of vocabulary, ids around a caption, id of the padding, length; {}: vectors."""
    if text_fields(run.config):
        return {}
    tokenizer = load_tokenizer(run.config)
    return {
        "kind": run.config.tokenizer.kind,
        "begin": tokenizer.begin_id,
        "end": tokenizer.end_id,
        "padding": 0,
        "most": run.config.data.max_tokens,
    }


def _programs(run: planned_run.PlannedRun, signatures: Mapping[str, Any], about: model_card.About) -> dict[str, Any]:
    """Contents of PROGRAMS: everything that a caller needs who has neither this package nor the data set."""
    features = run.dataset.features
    fields = [name for side in ("image", "text") for name in signatures[side]["inputs"][0] if name in FIELDS]
    return {
        "format": FORMAT,
        "jax": jax.__version__,
        "platforms": list(PLATFORMS),
        "weights": WEIGHTS,
        "programs": signatures,
        "onnx": dict(about.onnx),
        "tokens": dict(about.tokens),
        "fields": {name: {"shape": features[name].shape, "dtype": str(features[name].dtype)} for name in fields},
        "text_encoder": run.dataset.metadata.get("text_encoder", ""),
    }


def _sums(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 of each file of the folder, by name."""
    return {path.name: (path.stat().st_size, sha256(path)) for path in sorted(folder.iterdir()) if path.name != SUMS}
