"""3SHNet's image encoder in NumPy float64, written from the equations of the released code (docs/models.md).

Batches are looped over, sets are compacted to their valid rows, the convolution is one: nothing here is masked,
tabled or taken apart as the library does it. Parameters come as the library's trees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models.text_oracle import dense, gru, layer_norm, softmax

Tree = Mapping[str, Any]


def sinusoid(position: int, size: int) -> np.ndarray:
    angles = [position * 10000.0 ** (-2.0 * j / size) for j in range(size // 2)]
    return np.array([f(a) for a in angles for f in (math.sin, math.cos)])


def batch_norm(x: np.ndarray, p: Tree, stats: Tree | None, counted: np.ndarray | None = None) -> np.ndarray:
    """x [..., c]; stats None: training, with the statistics of the rows that are counted [...] (None: all)."""
    if stats is None:
        rows = x.reshape(-1, x.shape[-1]) if counted is None else x[counted]
        mean, var = rows.mean(axis=0), rows.var(axis=0)
    else:
        mean, var = (np.asarray(stats[name], np.float64) for name in ("mean", "var"))
    scale, bias = (np.asarray(p[name], np.float64) for name in ("scale", "bias"))
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def mlp(x: np.ndarray, p: Tree, stats: Tree | None, counted: np.ndarray | None = None) -> np.ndarray:
    hidden = batch_norm(dense(x, p["in"]), p["norm"], None if stats is None else stats["norm"], counted)
    return dense(np.maximum(hidden, 0.0), p["out"])


def gpo_weights(length: int, p: Tree) -> np.ndarray:
    codes = np.stack([sinusoid(k, 32) for k in range(length)])
    states = (gru(codes, p["forward"]) + gru(codes[::-1], p["backward"])[::-1]) / 2
    return softmax(states @ np.asarray(p["score"], np.float64) / 0.1)


def pool(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Valid rows [l, d]: sum over k of weights[k] times the k-th largest of each channel."""
    return sum(
        (weights[k] * np.sort(rows, axis=0)[len(rows) - 1 - k] for k in range(len(rows))), np.zeros(rows.shape[1])
    )


def seg_embed(x: np.ndarray, p: Tree) -> np.ndarray:
    """Without dropout."""
    return layer_norm(np.maximum(dense(x, p["linear"]), 0.0), p["norm"], 1e-5)


def map_channels(seg_map: np.ndarray, p: Tree, inputs: str, position: str) -> np.ndarray:
    """seg_map [H, W] -> [H, W, channels]: the class, then the 8 channels of the position code."""
    height, width = seg_map.shape
    pixels = []
    for r in range(height):
        for c in range(width):
            label = int(seg_map[r, c])
            if inputs == "raw_id":
                by_class = np.array([float(label)])
            else:
                table = np.asarray(p["classes"]["embedding"], np.float64)
                by_class = table[min(label, len(table) - 1)]
            codes = {"1d": [sinusoid(r * width + c, 8)], "2d": [sinusoid(r, 4), sinusoid(c, 4)]}[position]
            pixels.append(np.concatenate([by_class, *codes]))
    return np.stack(pixels).reshape(height, width, -1)


def convolve(image: np.ndarray, p: Tree) -> np.ndarray:
    """3x3 with zero padding: [H, W, i] -> [H*W, o]."""
    kernel, bias = np.asarray(p["kernel"], np.float64), np.asarray(p["bias"], np.float64)
    height, width, _ = image.shape
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    rows = [np.tensordot(padded[r : r + 3, c : c + 3], kernel, 3) for r in range(height) for c in range(width)]
    return np.stack(rows) + bias


def unit(x: np.ndarray) -> np.ndarray:
    return x / (math.sqrt(float(x @ x)) + 1e-8)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The encoder of `config.model`'s options on trees of parameters and statistics (None: training, no dropout)."""

    params: Tree
    stats: Tree | None
    options: Mapping[str, Any]

    def at(self, *path: str) -> tuple[Tree, Tree | None]:
        params, stats = self.params, self.stats
        for key in path:
            params = params[key]
            stats = None if stats is None else stats.get(key, {})
        return params, stats

    def map_keys(self, seg_map: np.ndarray) -> np.ndarray:
        """[n, H, W] -> [n, H*W, channels]."""
        p, stats = self.at("spatial", "map")
        o = self.options
        before = np.stack([convolve(map_channels(m, p, o["map_input"], o["map_position"]), p) for m in seg_map])
        return np.maximum(batch_norm(before, p["norm"], None if stats is None else stats["norm"]), 0.0)

    def semantic(self, linear: np.ndarray, mask: np.ndarray, seg: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
        p, _ = self.at("semantic")
        dim = linear.shape[-1]
        scene = seg_embed(seg.mean(axis=(2, 3)), p["scene"])
        scene = mlp(scene, *self.at("semantic", "scene_mlp")) + scene
        units = mlp(linear, *self.at("semantic", "unit_mlp"), counted) + linear
        out = np.zeros_like(linear)
        for b, k in np.ndindex(mask.shape):
            gate = 1.0 / (1.0 + math.exp(-units[b, k] @ scene[b] / math.sqrt(dim))) if mask[b, k] else 0.0
            gated = gate * units[b, k]
            query = scene[b] if mask[b, k] else 0.0
            out[b, k] = np.maximum(dense(gated * np.tanh(dense(gated, p["scale"])) + query, p["out"]), 0.0)
        return out

    def spatial(
        self, linear: np.ndarray, mask: np.ndarray, seg_map: np.ndarray, counted: np.ndarray | None
    ) -> np.ndarray:
        keys = self.map_keys(seg_map)
        query = mlp(linear, *self.at("spatial", "query_mlp"), counted)
        context = np.zeros_like(query)
        for b, k in np.ndindex(mask.shape):
            logits = self.options["spatial_scale"] * (keys[b] @ query[b, k]) / math.sqrt(query.shape[-1])
            context[b, k] = mask[b, k] * (softmax(logits) @ keys[b])
        return mlp(context + query, *self.at("spatial", "out_mlp"), counted)

    def sets(self, batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The pooled set of each image, [l, dim]."""
        o = self.options
        linears, projecteds, masks = [], [], []
        for unit in o["units"]:
            x = np.asarray(batch[unit], np.float64)
            mask = batch.get(f"{unit.removesuffix('s')}_mask", np.ones(x.shape[:2], bool))
            counted = None if o["bn_include_padding"] else mask
            linears.append(dense(x, self.at(f"{unit}_linear")[0]))
            projecteds.append(linears[-1] + mlp(x, *self.at(f"{unit}_mlp"), counted))
            masks.append(mask)
        linear, projected, mask = (np.concatenate(parts, axis=1) for parts in (linears, projecteds, masks))
        counted = None if o["bn_include_padding"] else mask
        members = [[row[m] for row, m in zip(projected, mask, strict=True)]]

        highlighted = []
        if o["semantic"]:
            seg = np.asarray(batch["seg_semantic"], np.float64)
            highlighted.append(self.semantic(linear, mask, seg, counted))
        if o["spatial"]:
            highlighted.append(self.spatial(linear, mask, batch["seg_map"], counted))
        if highlighted:
            fused = mlp(sum(highlighted) + projected, *self.at("fusion_mlp"), counted)
            members.append([row[m] for row, m in zip(fused, mask, strict=True)])
        if o["scene_tokens"]:
            seg = np.asarray(batch["seg_semantic"], np.float64)
            cells = np.stack([[s[:, r, c] for r in range(s.shape[1]) for c in range(s.shape[2])] for s in seg])
            scene = seg_embed(cells, self.params["scene"])
            members.append(list(mlp(scene, *self.at("scene_mlp")) + scene))
        if o["category_token"]:
            category = seg_embed(np.asarray(batch["categories"], np.float64), self.params["category"])
            members.append([row[None] for row in category])
        return [np.concatenate(parts) for parts in zip(*members, strict=True)]

    def __call__(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Unit vectors [n, dim]."""
        vectors = []
        for image, rows in enumerate(self.sets(batch)):
            vector = unit(pool(rows, gpo_weights(len(rows), self.params["pool"])))
            if self.options["global_residual"]:
                given = unit(np.asarray(batch["image_embedding"][image], np.float64))
                vector = unit(vector + dense(given, self.params["global_linear"]))
            vectors.append(vector)
        return np.stack(vectors)
