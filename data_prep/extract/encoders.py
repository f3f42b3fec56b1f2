"""Dual encoders for one's own photographs: the folder of one, and the vectors of single photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.extract import run
from data_prep.extract.settings import Settings
from data_prep.schema import DataError
from shnet_jax import untrusted
from shnet_jax.data.checksums import sha256

DEFAULT = "openai/clip-vit-base-patch32"
"""CLIP ViT-B/32 (Radford et al., 2021): 151 million parameters, 0.6 GB in float32; its code is MIT. English."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FILES = (
    "config.json",
    "preprocessor_config.json or processor_config.json",
    " or ".join(WEIGHTS),
    "tokenizer.json or spiece.model or merges.txt and vocab.json",
)
"""Files of a dual encoder's folder, as Hugging Face saves it."""
KINDS = ("clip", "siglip")
"""Values of model_type in config.json: CLIP, and SigLIP or SigLIP 2 for pictures of a fixed size."""
DESCRIBED = ("config.json", "preprocessor_config.json", "processor_config.json")
"""Files that say how a model is built and how it sees pictures."""
_SMALL = ("*.json", "merges.txt", "spiece.model")


def folder_of(model: str) -> Path:
    """The folder of a dual encoder: `model` itself, or the files of that name on the hub, fetched unless they are here.

    Raises DataError, one line that says which files to put where, for a folder that lacks some, and for a name that is
    neither in the cache nor can be fetched.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise DataError(f"--model={model}: no such folder; {_advice(DEFAULT)}")
        folder = _fetched(model)
    if lacking := _lacking(folder):
        raise DataError(f"--model={model}: {folder} has no {', no '.join(lacking)}; {_advice(model)}")
    kind = untrusted.read_object(folder / "config.json").get("model_type")
    if kind not in KINDS:
        raise DataError(
            f"{folder / 'config.json'}: expected model_type 'clip' or 'siglip', found {kind!r}: words are "
            "searched with CLIP, SigLIP and SigLIP 2 of a fixed size, such as google/siglip2-base-patch16-224"
        )
    return folder


def _advice(model: str) -> str:
    name = DEFAULT if Path(model).is_dir() else model
    return (
        f"expected a folder as Hugging Face saves a CLIP or SigLIP, with {'; '.join(FILES)}: fetch it on a machine "
        f"with a network (hf download {name} --local-dir=FOLDER) and give --model=FOLDER"
    )


def _lacking(folder: Path) -> list[str]:
    lacking = []
    for names in FILES:
        choices = [choice.split(" and ") for choice in names.split(" or ")]
        if not any(all((folder / name).is_file() for name in choice) for choice in choices):
            lacking.append(names)
    return lacking


def _fetched(name: str) -> Path:
    """The folder of a model in the hub's cache, downloaded if needed."""
    try:
        from data_prep.extract import hub
    except ImportError as error:
        raise DataError(f"{name}: needs {error.name}: pip install 'shnet_jax[extract]'") from error
    folder = hub.cached(name)
    if folder is not None and not _lacking(folder):
        return folder
    try:
        folder = hub.fetch(name, *_SMALL, WEIGHTS[0])
        return folder if (folder / WEIGHTS[0]).is_file() else hub.fetch(name, *_SMALL, WEIGHTS[1])
    except (OSError, ValueError) as error:  # no network, no such model, HF_HUB_OFFLINE
        raise DataError(f"{hub.not_here('--model', name, error)}; {_advice(name)}") from error


def open_encoder(model: Path, device: str = "") -> Callable[[Sequence[Image.Image], Sequence[str]], np.ndarray]:
    """Loads the vision tower of a dual encoder.

    The result gives the `image_embedding` [n, E] float32 of pictures, called by their names, as in a data set of
    `own_photos`. Raises DataError without PyTorch or transformers.
    """
    extractor = run.load_extractor(Settings(Path(), "", str(model), tokens="none"), device)

    def see(pictures: Sequence[Image.Image], names: Sequence[str]) -> np.ndarray:
        return np.stack([record["image_embedding"] for record in extractor(pictures, names)])

    return see


def files_sha256(model: Path) -> dict[str, str]:
    """SHA-256 of each file that `open_encoder` loads: configuration, preparation of pictures, and weights.

    Of several forms of the weights, transformers loads one: safetensors before PyTorch's.
    """
    weights = next((files for form in _WEIGHTS if (files := _fitting(model, form))), [])
    return {path.name: sha256(path) for path in (*_fitting(model, DESCRIBED), *weights)}


def _fitting(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


_WEIGHTS = (WEIGHTS[:1], ("model.safetensors.index.json", "model-*-of-*.safetensors"), WEIGHTS[1:])
