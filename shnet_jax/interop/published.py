"""Checkpoints of the released PyTorch code of 3SHNet, USER and VSE-infinity: regions and BERT.

Such a file holds {"model": [state of the image encoder, state of the text encoder], "opt": its options, "epoch",
"best_rsum", "Eiters"}, names with DataParallel's "module." before them or not. Another published model is one more
`Family`.
"""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from shnet_jax.interop.bert_weights import bert_slots
from shnet_jax.interop.torch_file import TorchFile, open_torch_file
from shnet_jax.interop.torch_pickle import Tensor, brief
from shnet_jax.interop.torch_weights import (
    Slots,
    image_encoder_slots,
    is_unused,
    misfits,
    text_head_slots,
    to_variables,
    user_image_encoder_slots,
    vse_encoder_slots,
)

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

_WORDS = "bert.embeddings.word_embeddings.weight"
_SEGMENTATION = ("model.semantic", "model.spatial", "model.scene_tokens", "model.category_token")


@dataclasses.dataclass(frozen=True)
class Family:
    """A published image encoder.

    mark: an array that it has and those after it in FAMILIES do not. slots: its places, given their path.
    fields: those of a configuration that make ours the same model. sizes: those of config.model that are the length of
    an array's axis. options: fields that its own options give, beside those in TRAINING.
    """

    title: str
    mark: str
    slots: Callable[..., Slots]
    fields: Mapping[str, Any]
    sizes: Mapping[str, tuple[str, int]]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


FAMILIES = (
    Family(
        "3SHNet, region model",
        "crossmodalfusion_sp.embedding_Seg.0.weight",
        image_encoder_slots,
        {
            "model.name": "shnet",
            "model.units": ("regions",),
            **dict.fromkeys(_SEGMENTATION, True),
            "model.map_input": "raw_id",
            "model.map_position": "1d",
            "model.spatial_scale": 4.0,
            "loss.triplet.mask_same_image": False,
        },
        {
            "dim": ("fc.weight", 0),
            "num_classes": ("embed_category.0.weight", 1),
            "map_channels": ("crossmodalfusion_sp.embedding_Seg.0.weight", 0),
        },
    ),
    Family(
        "USER (SGE), region model",
        "v_sa.embedding_local.0.weight",
        user_image_encoder_slots,
        {
            "model.name": "user",
            "model.units": ("regions",),
            "model.user.guides": ("sge",),
            "model.user.norm": "slots",
            "data.region_drop": 0.0,
            "loss.uto.mask_same_image": False,
        },
        {"dim": ("fc.weight", 0)},
        {
            "attention_lamda": "model.user.attention_scale",
            "moco_M": "momentum.queue",
            "moco_r": "momentum.decay",
            "mu": "loss.uto.scale",
            "gama": "loss.uto.offset",
            "loss_lamda": "loss.uto.batch_weight",
        },
    ),
    Family(
        "VSE-infinity, region model",
        "fc.weight",
        vse_encoder_slots,
        {
            "model.name": "shnet",
            "model.units": ("regions",),
            **dict.fromkeys(_SEGMENTATION, False),
            "loss.triplet.mask_same_image": False,
        },
        {"dim": ("fc.weight", 0)},
    ),
)

# Options of all released codes that say how a model was trained, by our names.
TRAINING: Mapping[str, str] = {
    "margin": "loss.triplet.margin",
    "vse_mean_warmup_epochs": "loss.triplet.warmup_epochs",
    "batch_size": "train.batch_size",
    "num_epochs": "train.epochs",
    "learning_rate": "optim.lr",
    "lr_update": "optim.decay_epochs",
    "grad_clip": "optim.clip_norm",
}
# What our model computes; a checkpoint trained otherwise would give other embeddings. Absent: as here.
_REQUIRED = {"no_imgnorm": False, "no_txtnorm": False, "precomp_enc_type": "basic"}


@dataclasses.dataclass(frozen=True)
class Published:
    """An opened checkpoint: tensors of the two encoders by their names without "module.", options, training steps."""

    family: Family
    image: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    options: Mapping[str, Any]
    step: int
    file: TorchFile

    def fields(self) -> dict[str, Any]:
        """Fields of a configuration, by dotted name, that follow from shapes and options.

        The number of attention heads cannot be seen in either.
        """
        image, text = _shapes(self.image), _shapes(self.text)
        fields = dict(self.family.fields)
        fields |= {f"model.{name}": _size(image, *place) for name, place in self.family.sizes.items()}
        fields["plan.region_dim"] = _size(image, "fc.weight", 1)
        fields |= {f"text.{name}": size for name, size in bert_sizes(text).items()}
        fields |= {"text.tower": "bert", "text.weights": "", "text.frozen_layers": 0, "optim.ema": 0.0}
        same = {"embed_size": fields["model.dim"], "img_dim": fields["plan.region_dim"]} | _REQUIRED
        for option, expected in same.items():
            if (value := self.options.get(option, expected)) != expected:
                raise ValueError(
                    f"{self.file.path}: opt.{option} is {brief(value)}; the arrays, or our model, have {expected!r}"
                )
        named = {**TRAINING, **self.family.options}
        numbers = {f: self.options[o] for o, f in named.items() if type(self.options.get(o)) in (int, float)}
        for field, number in numbers.items():
            if not abs(number) < 2**53:
                raise ValueError(
                    f"{self.file.path}: an option that becomes config.{field} is {brief(number)}, expected a number "
                    "that training could have had"
                )
        if decay := numbers.pop("optim.decay_epochs", None):
            fields["optim.decay_epochs"] = (float(decay),)
        return fields | numbers

    def variables(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """Variables {"params", "batch_stats"}, float32, for a model whose arrays are `like`.

        Raises ValueError that names each tensor which is missing, unexpected, misshapen or not finite.
        """
        layers = bert_sizes(_shapes(self.text))["layers"]
        slots = {"image": self.family.slots("image"), "text": text_encoder_slots(layers, "text")}
        tensors = {"image": self.image, "text": self.text}
        lines = [
            f"{side} encoder, {line}" for side in slots for line in misfits(_shapes(tensors[side]), slots[side], like)
        ]
        flat = traverse_util.flatten_dict(dict(like))
        filled = {(slot.collection, *slot.path) for side in slots.values() for slot in side.values()}
        lines += [f"not in the published code: {'/'.join(path)}" for path in flat if path not in filled]
        if lines:
            shown = [*lines[:40], f"and {len(lines) - 40} more"] if len(lines) > 40 else lines
            raise ValueError(f"{self.file.path} does not fit {self.family.title}:\n  " + "\n  ".join(shown))
        unused = [name for side in tensors.values() for name in side if is_unused(name)]
        log.info("%s: %d tensors not used: %s", self.file.path, len(unused), ", ".join(unused))

        trees = [
            to_variables({n: self._array(t) for n, t in tensors[side].items() if n in slots[side]}, slots[side])
            for side in slots
        ]
        merged = {k: v for tree in trees for k, v in traverse_util.flatten_dict(tree).items()}
        variables = traverse_util.unflatten_dict({path: np.ascontiguousarray(a) for path, a in merged.items()})
        return {name: variables.get(name, {}) for name in ("params", "batch_stats")}

    def _array(self, tensor: Tensor) -> np.ndarray:
        array = np.asarray(self.file.array(tensor), np.float32)
        if not np.isfinite(array).all():
            name = next(n for side in (self.image, self.text) for n, t in side.items() if t == tensor)
            raise ValueError(f"{self.file.path}: {name} holds numbers that are not finite")
        return array


def open_published(path: str | Path) -> Published:
    """Opens a checkpoint of the released code; its tensors stay in the file.

    Raises FileNotFoundError, and ValueError for what cannot be read safely or is not such a checkpoint.
    """
    file = open_torch_file(path)
    content = file.content
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, list | tuple) or len(model) != 2:
        keys = [key for key in content if isinstance(key, str)] if isinstance(content, dict) else []
        contents = ", ".join(keys) or f"a {type(content).__name__}"
        raise ValueError(
            f"{path}: expected a checkpoint of the released code, a dict whose 'model' is a list of the states of "
            f"image and text encoder; found {contents[:300]}"
        )
    image, text = (_state(file, side, state) for side, state in zip(("image", "text"), model, strict=True))
    family = next((f for f in FAMILIES if f.mark in image), None)
    if family is None:
        raise ValueError(
            f"{path}: the image encoder is of no known kind ({', '.join(f.title for f in FAMILIES)}); "
            f"it has {', '.join(list(image)[:20])}"
        )
    if _WORDS not in text:
        raise ValueError(f"{path}: the text encoder has no {_WORDS}, so it is no BERT; it has {', '.join(text)[:300]}")
    options, step = content.get("opt"), content.get("Eiters")
    options = dict(vars(options)) if isinstance(options, types.SimpleNamespace) else options
    if not isinstance(options, dict):
        log.warning("%s: no options ('opt'); taken to be those of the released scripts", path)
        options = {}
    return Published(family, image, text, options, step if type(step) is int and step > 0 else 1, file)


def text_encoder_slots(layers: int, *path: str) -> Slots:
    """Slots of the released `EncoderText`, a BERT of this many layers with its head, at `path`."""
    return bert_slots(layers, "bert.", *path, "tower") | text_head_slots(*path)


def bert_sizes(shapes: Shapes) -> dict[str, int]:
    """Sizes of the BERT in a state of `EncoderText` by their names in config.text, without the heads."""
    return {
        "layers": sum(name.endswith("attention.self.query.weight") for name in shapes),
        "width": _size(shapes, _WORDS, 1),
        "mlp_dim": _size(shapes, "bert.encoder.layer.0.intermediate.dense.weight", 0),
        "vocab_size": _size(shapes, _WORDS, 0),
        "max_positions": _size(shapes, "bert.embeddings.position_embeddings.weight", 0),
    }


def _size(shapes: Shapes, name: str, axis: int) -> int:
    shape = shapes.get(name, ())
    if len(shape) <= axis or shape[axis] < 1:
        raise ValueError(f"{name} is {shape or 'missing'}; the model's sizes cannot be told without it")
    return shape[axis]


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in state.items()}


def _state(file: TorchFile, side: str, value: Any) -> dict[str, Tensor]:
    state = file.state(value, f"the state of the {side} encoder")
    short = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if len(short) != len(state):
        raise ValueError(f"{file.path}: the {side} encoder has names both with and without 'module.'")
    return short
