"""Patch tokens and a global embedding by CLIP, SigLIP, DINOv2 or DINOv3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BitImageProcessorPil

from data_prep.schema import DataError


class Backbone:
    """A vision transformer that sees the whole photograph, squashed to a square.

    Nothing is cropped, unlike CLIP's and DINOv2's own preparation, so that boxes and the grid cover the same picture.
    """

    def __init__(self, name: str, device: torch.device, image_size: int | None = None, *, projected: bool = False):
        """Loads the model `name`. image_size: side of the square in pixels; None is what its processor makes.

        projected: tokens lie in the space of the global vector, which of the models only CLIP offers.
        """
        self._processor = _processor(name)
        self._model = AutoModel.from_pretrained(name, trust_remote_code=False).eval().to(device)
        self._device = device
        self._projected = projected
        if projected and not hasattr(self._model, "visual_projection"):
            raise DataError(
                f"backbone {name}: --tokens=projected expects a CLIP, which projects into a joint space; this is "
                f"{self._model.config.model_type}. Its tokens are stored by --tokens=hidden"
            )
        vision = getattr(self._model.config, "vision_config", self._model.config)
        for needed in ("image_size", "patch_size"):
            if not isinstance(getattr(vision, needed, None), int):
                raise DataError(
                    f"backbone {name}: expected a vision transformer with square patches, found no {needed}"
                )
        self._size = image_size or _own_size(self._processor, vision.image_size)
        self._side, rest = divmod(self._size, vision.patch_size)
        if rest:
            raise DataError(f"backbone {name}: image_size {self._size}: expected a multiple of {vision.patch_size}")
        # DINOv2 and v3 always fit their positions to the image; CLIP and SigLIP want to be asked.
        fit = self._size != vision.image_size and not vision.model_type.startswith("dinov")
        self._options = {"interpolate_pos_encoding": True} if fit else {}

    def __call__(self, images: Sequence[Image.Image]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Computes the tokens [h, w, D] and the global vector [E] of each image, both float32.

        The tokens are the last hidden state; projected ones went through the norm and the matrix that CLIP has for its
        class token (as in IRRA, Jiang and Ye, CVPR 2023), and D is E.
        The vector is CLIP's projected image embedding, SigLIP's pooled one or DINO's class token; not normalised.
        """
        size = {"height": self._size, "width": self._size}
        inputs = self._processor(
            images=list(images), do_resize=True, size=size, do_center_crop=False, return_tensors="pt"
        )
        pixels = inputs["pixel_values"].to(self._device)
        forward = getattr(self._model, "get_image_features", self._model)
        with torch.inference_mode():
            outputs = forward(pixel_values=pixels, **self._options)
            # Class and register tokens come before the patches.
            states = outputs.last_hidden_state[:, -(self._side**2) :]
            if self._projected:
                states = self._model.visual_projection(self._model.vision_model.post_layernorm(states))
        tokens = states.float().cpu().numpy()
        vectors = outputs.pooler_output.float().cpu().numpy()
        return list(zip(tokens.reshape(len(images), self._side, self._side, -1), vectors, strict=True))


def _processor(name: str) -> Any:
    """The image processor of a model, in Pillow."""
    if AutoConfig.from_pretrained(name, trust_remote_code=False).model_type == "dinov3_vit":
        # Its own class needs torchvision; of the others this one has the same fields.
        return BitImageProcessorPil.from_pretrained(name, do_center_crop=False)
    return AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)


def _own_size(processor: object, default: int) -> int:
    """Side of the images that a processor makes."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or getattr(processor, "size", None) or {}
    return int(size.get("height") or size.get("shortest_edge") or default)
