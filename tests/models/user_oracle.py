"""USER's image encoder in NumPy float64, from the equations of docs/models.md; see image_oracle.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models import image_oracle as image
from tests.models.text_oracle import dense, layer_norm, softmax


def unit(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


@dataclasses.dataclass
class Encoder:
    """units: name -> [n, N, d]; masks: name -> [n, N]; stats None: training, without dropout."""

    params: Mapping[str, Any]
    stats: Mapping[str, Any] | None
    guides: tuple[str, ...]
    norm: str
    scale: float

    def __call__(self, units, masks, embeddings=None):
        projected = {name: self._project(name, x, masks[name], embeddings) for name, x in units.items()}
        vectors = []
        for i in range(len(next(iter(units.values())))):
            rows = np.concatenate([projected[name][i][masks[name][i]] for name in units])
            vectors.append(image.pool(rows, image.gpo_weights(len(rows), self.params["pool"])))
        return unit(np.stack(vectors))

    def _project(self, name, x, mask, embeddings):
        x = np.float64(x)
        added = np.zeros_like(x)
        if "sge" in self.guides:
            added += self._written(x, mask, self.guide(name, x, mask))
        if "cge" in self.guides:
            added += self._written(x, mask, unit(dense(np.float64(embeddings), self.params[f"{name}_cge"])))
        x = x + added
        stats = None if self.stats is None else self.stats[f"{name}_mlp"]
        return dense(x, self.params[f"{name}_linear"]) + image.mlp(x, self.params[f"{name}_mlp"], stats)

    def guide(self, name, x, mask, mean=None):
        p = self.params[f"{name}_sge"]
        stats = {"local_norm": None, "global_norm": None} if self.stats is None else self.stats[f"{name}_sge"]
        if mean is None:
            mean = np.stack([rows[valid].mean(0) for rows, valid in zip(x, mask, strict=True)])
        local = dense(x, p["local"])
        if self.norm == "layer":
            local = layer_norm(local, p["local_norm"], 1e-5)
        else:  # a channel for each place: its mean and variance over images and features
            local = image.batch_norm(local.swapaxes(1, 2), p["local_norm"], stats["local_norm"]).swapaxes(1, 2)
        whole = np.tanh(image.batch_norm(dense(mean, p["global"]), p["global_norm"], stats["global_norm"]))
        guides = []
        for rows, valid, units, g in zip(np.tanh(local), mask, x, whole, strict=True):
            weights = softmax(dense(rows[valid] * g, p["weight"])[:, 0])
            guides.append(weights @ units[valid])
        return unit(np.stack(guides))

    def _written(self, x, mask, guide):
        added = np.zeros_like(x)
        for i, valid in enumerate(mask):
            share = softmax(self.scale * x[i][valid] @ guide[i])
            added[i][valid] = unit(share)[:, None] * guide[i]
        return added
