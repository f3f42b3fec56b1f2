"""Tokens and a global vector by a convolutional network: what `timm` has and transformers lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.extract import hub
from data_prep.extract.settings import TIMM
from data_prep.schema import DataError


class ConvNet:
    """A network whose `forward_features` maps pixels [n, 3, S, S] to [n, D, h, w]; the photograph becomes a square."""

    def __init__(
        self,
        network: torch.nn.Module,
        device: torch.device,
        size: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ):
        """size: S, side of the square in pixels. mean, deviation: of the colours in 0..1 that it was trained with."""
        self._network: Any = network.eval().to(device)  # torch knows no method forward_features
        self._device, self._size, self._resample = device, size, resample
        self._mean, self._deviation = np.asarray(mean, np.float32), np.asarray(deviation, np.float32)

    def sha256(self) -> str:
        """SHA-256 of the names and values of its weights, which are float32 or whole numbers."""
        digest = hashlib.sha256()
        for name, values in self._network.state_dict().items():
            digest.update(name.encode() + values.cpu().numpy().tobytes())
        return digest.hexdigest()

    def __call__(self, images: Sequence[Image.Image]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Computes the tokens [h, w, D], the last features, and their mean [D] of each image, both float32."""
        squares = [image.resize((self._size, self._size), self._resample) for image in images]
        pixels = (np.stack([np.asarray(square, np.float32) for square in squares]) / 255 - self._mean) / self._deviation
        batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(self._device)
        with torch.inference_mode():
            features = self._network.forward_features(batch)
        if features.ndim != 4:
            raise DataError(
                f"backbone: expected features [n, D, h, w] of a convolutional network, found {features.ndim}-D"
            )
        tokens = features.float().permute(0, 2, 3, 1).cpu().numpy()
        return [(token, token.mean((0, 1))) for token in tokens]


def load(name: str, device: torch.device, image_size: int | None = None) -> ConvNet:
    """The pretrained model NAME of timm, with the colours and the size it was trained with.

    image_size: another side of the square. Raises DataError without timm, for a name that it does not have, and for
    weights that are neither in the hub's cache nor can be fetched.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise DataError(f"--backbone={name}: needs timm ({error}): pip install 'shnet_jax[timm]'") from error
    known = name.removeprefix(TIMM)
    if not timm.is_model(known):
        near = ", ".join(timm.list_models(f"*{known.split('.')[0]}*")[:3]) or "none near it"
        raise DataError(f"--backbone={name}: timm has no model of this name; near it: {near}")
    try:
        place = timm.get_pretrained_cfg(known).hf_hub_id
        if place:  # timm itself would try for a minute to reach the hub
            hub.fetch(place, "config.json")
        network = timm.create_model(known, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"--backbone={name}: its weights are not in the cache of the hub and could not be fetched ({reason:.150})"
        ) from error
    trained = timm.data.resolve_data_config({}, model=network)
    return ConvNet(network, device, image_size or trained["input_size"][-1], trained["mean"], trained["std"])
