"""FLOPs of the published 3SHNet, counted by hand from its equations (docs/models.md).

The matrix products and the convolution count as the published code makes them: padding included, every image and
caption by itself. A multiplication and an addition are two operations. Biases, norms, softmax, activations, the sort,
the optimiser and GPO's small GRU do not count. An implementation with fewer operations for the same result is credited
with those of the published model, so more work never raises its utilisation.
"""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

TRAINING = 3
"""Operations of a training step divided by those of its forward pass; the backward pass has two products for each one.

Products with features of the data set have only one there, as these need no gradient: see `given_flops`.
"""


def image_flops(model: ConfigDict, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Forward operations for one image, by part.

    Args:
      model: `config.model` with units = ("regions",).
      shapes: of one record: regions (K, F), seg_semantic (C, h, w), seg_map (H, W).

    With K regions of F features, C classes, h*w cells, P = H*W map positions, D = model.dim and c = model.map_channels,
    in products of a matrix [rows, i] with one [i, o] (rows * i * o multiplications):

      units     K: F -> D;  F' = F + MLP(F -> D/2 -> D)
      semantic  scene 1: C -> D, MLP(D -> D/2 -> D);  units K: MLP(D -> D/2 -> D);  gate K: D -> 1;  K: D -> D twice
      spatial   convolution P: 9 * (1 + 8) -> c;  query K: MLP(D -> D/2 -> c);  attention K: c -> P and P -> c;
                out K: MLP(c -> D/2 -> D)
      fusion    K: MLP(D -> D/2 -> D)
      scene     h*w: C -> D, MLP(D -> D/2 -> D)
      category  1: C -> D
      pool      1 x m members: m -> 1 for each of D channels
    """
    count, features = shapes["regions"]
    dim, classes = model.dim, model.num_classes

    def mlp(rows: int, inputs: int, outputs: int) -> float:
        return rows * (inputs * (dim // 2) + (dim // 2) * outputs)

    products = {"units": count * features * dim + mlp(count, features, dim)}
    members = count
    if model.semantic:
        scene = classes * dim + mlp(1, dim, dim)
        products["semantic"] = scene + mlp(count, dim, dim) + count * dim + 2 * count * dim * dim
    if model.spatial:
        height, width = shapes["seg_map"]
        positions, channels = height * width, model.map_channels
        convolution = positions * 9 * (1 + 8) * channels
        attention = 2 * count * positions * channels
        products["spatial"] = convolution + mlp(count, dim, channels) + attention + mlp(count, channels, dim)
    if model.semantic or model.spatial:
        products["fusion"] = mlp(count, dim, dim)
        members += count
    if model.scene_tokens:
        _, height, width = shapes["seg_semantic"]
        cells = height * width
        products["scene"] = cells * classes * dim + mlp(cells, dim, dim)
        members += cells
    if model.category_token:
        products["category"] = classes * dim
        members += 1
    products["pool"] = members * dim
    return {part: 2.0 * multiplications for part, multiplications in products.items()}


def given_flops(model: ConfigDict, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Part of `image_flops` that multiplies features of the data set: regions twice, scene classes, map, cells."""
    count, features = shapes["regions"]
    dim, classes = model.dim, model.num_classes
    products = count * features * (dim + dim // 2)
    if model.semantic:
        products += classes * dim
    if model.spatial:
        height, width = shapes["seg_map"]
        products += height * width * 9 * (1 + 8) * model.map_channels
    if model.scene_tokens:
        _, height, width = shapes["seg_semantic"]
        products += height * width * classes * dim
    if model.category_token:
        products += classes * dim
    return 2.0 * products


def image_training_flops(model: ConfigDict, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Training operations for one image: forward pass, gradients of all weights and of all inputs but the features."""
    return TRAINING * sum(image_flops(model, shapes).values()) - given_flops(model, shapes)


def text_flops(text: ConfigDict, dim: int, tokens: int) -> dict[str, float]:
    """Forward operations for one caption of `tokens` tokens through a BERT of `config.text`, by part.

    With L tokens, width W and MLP size M, each layer multiplies L: W -> W four times, L * L * W twice (attention) and
    L: W -> M -> W; the head L: W -> D.
    """
    width = text.width
    layer = 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * tokens * width * text.mlp_dim
    products = {"layers": text.layers * layer, "head": tokens * width * dim, "pool": tokens * dim}
    return {part: 2.0 * multiplications for part, multiplications in products.items()}


def step_flops(config: ConfigDict, shapes: Mapping[str, tuple[int, ...]], tokens: int, pairs: int) -> float:
    """Operations of a training step on `pairs` image-caption pairs: towers, scores of all pairs, backward pass."""
    image = image_training_flops(config.model, shapes)
    text = TRAINING * sum(text_flops(config.text, config.model.dim, tokens).values())
    return pairs * (image + text) + TRAINING * 2.0 * pairs * pairs * config.model.dim
