"""Search by a photograph that is no part of the gallery: the encoder that made a run of `shnet photos` sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from PIL import Image

from shnet_jax.api import Retriever
from shnet_jax.observe.files import write_json
from shnet_jax.training.load import Loaded
from shnet_jax.types import Embedding
from shnet_jax.untrusted import read_object

ENCODER = "encoder.json"
"""File of a work folder: the encoder's folder, and the SHA-256 of each file of its weights."""
Sight = Callable[[Sequence[Image.Image], Sequence[str]], Embedding]
"""Encodes pictures, called by their names, into the joint space."""


def note_encoder(workdir: Path, folder: Path) -> None:
    """Writes ENCODER."""
    from data_prep.extract import encoders

    write_json(workdir / ENCODER, {"folder": str(folder), "weights_sha256": encoders.weights_sha256(folder)})


def sees_photographs(config: ConfigDict) -> bool:
    """Whether a run is of a dual encoder, which `shnet photos` makes."""
    return bool(config.model.name == "dual" and config.text.weights)


def check_encoder(config: ConfigDict, workdir: Path) -> Path:
    """The folder of the encoder that made the run in `workdir`.

    Raises ValueError for a run that no encoder of photographs made, or whose encoder has other weights now;
    FileNotFoundError where it is gone.
    """
    from data_prep.extract import encoders

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
    noted = read_object(workdir / ENCODER).get("weights_sha256") if (workdir / ENCODER).is_file() else None
    if noted is not None and noted != (found := encoders.weights_sha256(folder)):
        raise ValueError(
            f"{folder}: sha256 of the weights: expected {noted}, with which {workdir} was made, found {found}"
        )
    return folder


def open_sight(loaded: Loaded, config: ConfigDict, workdir: Path, device: str = "") -> Sight:
    """Loads the encoder of a run. device: of PyTorch; "": a GPU if there is one.

    Raises as `check_encoder`, and DataError, one line, where PyTorch or transformers are not installed.
    """
    from data_prep.extract import encoders

    see = encoders.open_encoder(check_encoder(config, workdir), device)
    retriever = Retriever(loaded, config)
    return lambda pictures, names: retriever.encode_images({"image_embedding": see(pictures, names)})
