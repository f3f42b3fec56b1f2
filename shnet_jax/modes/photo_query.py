"""Search by a photograph that is no part of the gallery: the encoder that made a run of `shnet photos` sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image

from shnet_jax.api import Retriever
from shnet_jax.observe.files import write_json
from shnet_jax.training.load import Loaded
from shnet_jax.types import Embedding
from shnet_jax.untrusted import read_object

log = logging.getLogger(__name__)

ENCODER = "encoder.json"
"""File of a work folder: the encoder's folder, and the SHA-256 of each file that is loaded from it."""
Sight = Callable[[Sequence[Image.Image], Sequence[str]], Embedding]
"""Encodes pictures, called by their names, into the joint space."""


def note_encoder(workdir: Path, folder: Path) -> None:
    """Writes ENCODER into `workdir`, which is made if it is not there."""
    from data_prep.extract import encoders

    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / ENCODER, {"folder": str(folder), "sha256": encoders.files_sha256(folder)})


def noted_encoder(workdir: Path) -> dict[str, str] | None:
    """The SHA-256 of each file of the encoder, as `note_encoder` wrote them; None where there is no such note."""
    path = workdir / ENCODER
    noted = read_object(path).get("sha256") if path.is_file() else None
    return noted if isinstance(noted, dict) else None


def sees_photographs(config: ConfigDict) -> bool:
    """Whether a run is of a dual encoder, which `shnet photos` makes."""
    return bool(config.model.name == "dual" and config.text.weights)


def check_encoder(config: ConfigDict, workdir: Path) -> Path:
    """The folder of the encoder that made the run in `workdir`.

    Raises ValueError for a run that no encoder of photographs made, or whose encoder has other weights or prepares
    pictures otherwise now; FileNotFoundError where it is gone. A run without ENCODER gets a warning.
    """
    if not sees_photographs(config):
        raise ValueError(
            f"--photo is for runs of shnet photos; {workdir} has the model {config.model.name!r}, which reads features "
            "of an image: search by an image of the split with --image_id"
        )
    folder = Path(config.text.weights)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: the encoder of this run is not there; give its folder with --config.text.weights=FOLDER"
        )
    expected = noted_encoder(workdir)
    if expected is None:
        log.warning("%s has no %s with sha256: files of %s are taken unchecked", workdir, ENCODER, folder)
    else:
        check_files(workdir, folder, expected, "give the folder of that encoder with --config.text.weights=FOLDER")
    return folder


def check_files(workdir: Path, folder: Path, expected: Mapping[str, str], remedy: str) -> None:
    """Raises ValueError, which ends with `remedy`, where files of an encoder are not those of `noted_encoder`."""
    from data_prep.extract import encoders

    actual = encoders.files_sha256(folder)
    for name in sorted({*expected, *actual}):
        if expected.get(name) != actual.get(name):
            raise ValueError(
                f"{folder / name}: sha256: expected {expected.get(name, 'no such file')}, with which {workdir} was "
                f"made, found {actual.get(name, 'no such file')}; {remedy}"
            )


def open_sight(loaded: Loaded, config: ConfigDict, folder: Path, device: str = "") -> Sight:
    """Loads the encoder of a run. folder: of `check_encoder`. device: of PyTorch; "": a GPU if there is one.

    Raises DataError, one line, where PyTorch or transformers are not installed.
    """
    from data_prep.extract import encoders

    see = encoders.open_encoder(folder, device)
    retriever = Retriever(loaded, config)
    return lambda pictures, names: retriever.encode_images({"image_embedding": see(pictures, names)})
