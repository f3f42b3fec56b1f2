"""Names and layouts of the published PyTorch 3SHNet, USER and VSE-infinity modules, and of ours.

A map is a flat dict: torch name -> `Slot` (where the array lives with us and how its axes are turned). It works on
parameters, on gradients and on optimiser moments alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class Slot:
    """Place of a torch array in our variables: collection ("params" or "batch_stats"), path, axes in our order."""

    collection: str
    path: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    squeeze: bool = False

    def ours(self, array: np.ndarray) -> np.ndarray:
        """Converts a torch array to our layout."""
        array = array if self.axes is None else array.transpose(self.axes)
        return array.squeeze(-1) if self.squeeze else array

    def theirs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the torch array that has `shape` in our layout."""
        shape = (*shape, 1) if self.squeeze else shape
        return shape if self.axes is None else tuple(shape[self.axes.index(i)] for i in range(len(shape)))


Slots = dict[str, Slot]


def linear_slots(torch: str, *path: str) -> Slots:
    """Slots of `nn.Linear` in our `Dense` at `path`."""
    return {
        f"{torch}.weight": Slot("params", (*path, "kernel"), (1, 0)),
        f"{torch}.bias": Slot("params", (*path, "bias")),
    }


def norm_slots(torch: str, *path: str) -> Slots:
    """Slots of scale and bias of `nn.LayerNorm` (or a BatchNorm) at `path`."""
    return {
        f"{torch}.weight": Slot("params", (*path, "scale")),
        f"{torch}.bias": Slot("params", (*path, "bias")),
    }


def _batch_norm(torch: str, *path: str) -> Slots:
    return norm_slots(torch, *path) | {
        f"{torch}.running_mean": Slot("batch_stats", (*path, "mean")),
        f"{torch}.running_var": Slot("batch_stats", (*path, "var")),
    }


def _mlp(torch: str, *path: str) -> Slots:
    return (
        linear_slots(f"{torch}.layers.0", *path, "in")
        | _batch_norm(f"{torch}.bns.0", *path, "norm")
        | linear_slots(f"{torch}.layers.1", *path, "out")
    )


def gpo_slots(torch: str, *path: str) -> Slots:
    """Slots of GPO (`gpool` in the published encoders) at `path`."""
    slots = {f"{torch}linear.weight": Slot("params", (*path, "score"), (1, 0), squeeze=True)}
    for suffix, direction in (("", "forward"), ("_reverse", "backward")):
        for kind, ours in (("ih", "input"), ("hh", "hidden")):
            slots[f"{torch}gru.weight_{kind}_l0{suffix}"] = Slot("params", (*path, direction, f"{ours}_kernel"), (1, 0))
            slots[f"{torch}gru.bias_{kind}_l0{suffix}"] = Slot("params", (*path, direction, f"{ours}_bias"))
    return slots


def vse_encoder_slots(*path: str) -> Slots:
    """Slots of VSE-infinity's region image encoder (`EncoderImageAggr`) at `path`."""
    units = linear_slots("fc", *path, "regions_linear") | _mlp("mlp", *path, "regions_mlp")
    return units | gpo_slots("gpool.", *path, "pool")


def image_encoder_slots(*path: str) -> Slots:
    """Slots of 3SHNet's region image encoder (`EncoderImageAggr` of the released code) at `path`."""
    sm, sp = "crossmodalfusion_sm", "crossmodalfusion_sp"
    conv = {
        f"{sp}.embedding_Seg.0.weight": Slot("params", (*path, "spatial", "map", "kernel"), (2, 3, 1, 0)),
        f"{sp}.embedding_Seg.0.bias": Slot("params", (*path, "spatial", "map", "bias")),
    }
    return (
        vse_encoder_slots(*path)
        | linear_slots(f"{sm}.embed_seg_HW.2", *path, "semantic", "scene", "linear")
        | norm_slots(f"{sm}.embed_seg_HW.5", *path, "semantic", "scene", "norm")
        | _mlp(f"{sm}.MLP_seg", *path, "semantic", "scene_mlp")
        | _mlp(f"{sm}.MLP_image", *path, "semantic", "unit_mlp")
        | linear_slots(f"{sm}.fc_scale", *path, "semantic", "scale")
        | linear_slots(f"{sm}.fc_1", *path, "semantic", "out")
        | conv
        | _batch_norm(f"{sp}.embedding_Seg.1", *path, "spatial", "map", "norm")
        | _mlp(f"{sp}.MLP_image", *path, "spatial", "query_mlp")
        | _mlp(f"{sp}.embed_fusion", *path, "spatial", "out_mlp")
        | _mlp("fusion_mlp", *path, "fusion_mlp")
        | linear_slots("embed_seg_C.1", *path, "scene", "linear")
        | norm_slots("embed_seg_C.4", *path, "scene", "norm")
        | _mlp("seg_mlp", *path, "scene_mlp")
        | linear_slots("embed_category.0", *path, "category", "linear")
        | norm_slots("embed_category.3", *path, "category", "norm")
    )


def user_guide_slots(torch: str, *path: str) -> Slots:
    """Slots of USER's self-guide (`v_sa` of the released code), with the published norm, at `path`."""
    return (
        linear_slots(f"{torch}embedding_local.0", *path, "local")
        | _batch_norm(f"{torch}embedding_local.1", *path, "local_norm")
        | linear_slots(f"{torch}embedding_global.0", *path, "global")
        | _batch_norm(f"{torch}embedding_global.1", *path, "global_norm")
        | linear_slots(f"{torch}embedding_common.0", *path, "weight")
    )


def user_image_encoder_slots(*path: str) -> Slots:
    """Slots of USER's region image encoder (`EncoderImageAggr` of its released code) at `path`."""
    return (
        user_guide_slots("v_sa.", *path, "regions_sge")
        | linear_slots("fc", *path, "regions_linear")
        | _mlp("mlp", *path, "regions_mlp")
        | gpo_slots("gpool.", *path, "pool")
    )


def text_head_slots(*path: str) -> Slots:
    """Slots of the linear layer and GPO after the text tower (`EncoderText` of the released code) at `path`."""
    return linear_slots("linear", *path, "head") | gpo_slots("gpool.", *path, "pool")


# The second BatchNorm of each MLP is never applied, counters and position numbers carry nothing.
UNUSED = (".bns.1.", "num_batches_tracked", "position_ids", "token_type_ids", "pooler.")


def is_unused(name: str) -> bool:
    """Whether the published code owns an array of this name without using it, or without learning it."""
    return any(part in name for part in UNUSED)


def misfits(shapes: Mapping[str, tuple[int, ...]], slots: Slots, like: Mapping[str, Any]) -> list[str]:
    """Lists why torch arrays of these shapes do not fit the `slots` of a model with arrays `like`; [] if they do.

    like: {"params": ..., "batch_stats": ...}, leaves with a shape.
    """
    flat = traverse_util.flatten_dict(dict(like))
    expected = {name: slot.theirs(flat[slot.collection, *slot.path].shape) for name, slot in slots.items()}
    lines = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in shapes]
    for name, shape in shapes.items():
        if name not in expected:
            lines += [] if is_unused(name) else [f"unexpected: {name} {shape}"]
        elif shape != expected[name]:
            lines.append(f"misshapen: {name} is {shape}, expected {expected[name]}")
    return lines


def to_variables(arrays: Mapping[str, np.ndarray], slots: Slots) -> dict:
    """Converts torch arrays by name to {"params": ..., "batch_stats": ...}.

    Every array must have a slot (or be one of the published code's unused ones) and every slot of a collection that
    occurs must be filled; else ValueError names what is left over or missing.
    """
    leftover = [n for n in arrays if n not in slots and not is_unused(n)]
    # Without any known array all are missing: a wrong prefix must not pass as an empty set of weights.
    collections = {slots[n].collection for n in arrays if n in slots} or {slot.collection for slot in slots.values()}
    missing = [n for n, slot in slots.items() if slot.collection in collections and n not in arrays]
    if leftover or missing:
        raise ValueError(f"weights do not fit the model: unknown {leftover}, missing {missing}")
    flat = {
        (slots[n].collection, *slots[n].path): slots[n].ours(np.asarray(a)) for n, a in arrays.items() if n in slots
    }
    return traverse_util.unflatten_dict(flat)


def to_params(arrays: Mapping[str, np.ndarray], slots: Slots, like: Mapping[str, Any]) -> dict[str, Any]:
    """Converts torch arrays by name to the "params" of a model whose parameters are shaped as `like`, float32.

    Raises ValueError as `to_variables`, and one that names each misshapen tensor.
    """
    flat = traverse_util.flatten_dict(dict(like))
    expected = {name: slot.theirs(flat[slot.path].shape) for name, slot in slots.items() if name in arrays}
    wrong = [
        f"{name} is {np.shape(arrays[name])}, expected {shape}"
        for name, shape in expected.items()
        if np.shape(arrays[name]) != shape
    ]
    if wrong:
        raise ValueError(f"tensors whose shapes are not those of the configuration: {'; '.join(wrong)}")
    params = traverse_util.flatten_dict(to_variables(arrays, slots)["params"])
    return traverse_util.unflatten_dict({path: np.ascontiguousarray(a, np.float32) for path, a in params.items()})


def gpo_params(arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict:
    """Parameters of our `GPO` from torch's, whose names begin with `prefix` ("gpool." in the published encoders)."""
    slots = gpo_slots(prefix)
    return to_variables({n: a for n, a in arrays.items() if n in slots}, slots)["params"]
