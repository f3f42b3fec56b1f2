"""Heads on frozen vectors: LayerNorm and a mapping to the joint space.

Source: the released code of SAIL (arXiv 2412.04616) for linear, mlp, star and swiglu; ShareLock's head as SAIL's code
has it. Kernels start Xavier-uniform, biases at 0.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, from_config, in_float32, rounded, xavier_uniform
from shnet_jax.models.mlp import BatchNorm
from shnet_jax.ops.matmul import DType
from shnet_jax.types import DATA, Array

KINDS = ("star", "mlp", "linear", "swiglu", "sharelock", "none")
CLIP = 1e3  # bound on the two branches of "star", as published
EPSILON = 1e-5  # of the LayerNorm
SHARELOCK_LAYERS = 3
SHARELOCK_HIDDEN = 4096


class Head(nn.Module):
    """LayerNorm over the vector, then one of KINDS; with D the size of the result and d that of the vector:

      linear     W x + b
      mlp        Linear(d, 4 d) -> GELU (by erf) -> Linear(4 d, D)
      star       g(relu6(clip(f1 x)) * clip(f2 x)), clip to [-1e3, 1e3]; f1, f2: d -> 8 d, g: 8 d -> D
      swiglu     lin1(x) * silu(lin2(x)), both d -> D
      sharelock  three times Linear -> BatchNorm -> ReLU -> dropout of 4,096, then Linear(4096, D)
      none       the vector as it is, without LayerNorm; its width must be D

    Attributes:
      kind: one of KINDS.
      dim: D.
      hidden: size of the hidden layer; 0: as above.
      dropout: on hidden activations in training, on the normalised vector where there are none (linear, swiglu).
      dtype: of the operands of products.
      bn_sync: BatchNorm statistics over all devices (sharelock).
    """

    kind: str
    dim: int
    hidden: int = 0
    dropout: float = 0.0
    dtype: DType = "float32"
    bn_sync: bool = False

    @property
    def norm_depth(self) -> int:
        """Number of BatchNorms on the path; see `contract.RetrievalModel.norm_depth`."""
        return SHARELOCK_LAYERS if self.kind == "sharelock" else 0

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, *, train: bool) -> Array:
        """x [..., d] and mask [...] bool of the rows that count (None: all) -> [..., dim] float32.

        Between the layers lie arrays of the dtype of x, float32 or bfloat16. Raises ValueError for another width than
        dim with kind "none".
        """
        width = x.shape[-1]
        if self.kind == "none":
            if width != self.dim:
                raise ValueError(
                    f"the stored vectors are {width} wide and config.model.dim is {self.dim}: a head of kind 'none' "
                    "keeps vectors as they are; set model.dim to their width, or choose another head"
                )
            return x.astype(jnp.float32)
        x = LayerNorm(epsilon=EPSILON, name="norm")(x)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        if self.kind == "linear":
            return self._out("proj")(drop(x))
        if self.kind == "swiglu":
            x = drop(x)
            one, two = (self._dense(name, self.dim)(x) for name in ("lin1", "lin2"))
            return in_float32(lambda one, two: one * jax.nn.silu(two), one, two)
        if self.kind == "mlp":
            inner = rounded(ACTIVATIONS["gelu"], self._dense("in", self.hidden or 4 * width)(x))
            return self._out("out")(drop(inner))
        if self.kind == "star":
            one, two = (self._dense(name, self.hidden or 8 * width)(x) for name in ("f1", "f2"))
            return self._out("g")(drop(rounded(_star, one, two)))
        for layer in range(SHARELOCK_LAYERS):
            x = self._dense(f"hidden_{layer}", self.hidden or SHARELOCK_HIDDEN)(x)
            norm = BatchNorm(include_padding=False, axis=DATA if self.bn_sync else None, name=f"bn_{layer}")
            x = drop(jax.nn.relu(norm(x, mask, train=train)))
        return self._out("out")(x)

    def _out(self, name: str) -> Dense:
        return Dense(self.dim, self.dtype, xavier_uniform, result="float32", name=name)

    def _dense(self, name: str, features: int) -> Dense:
        return Dense(features, self.dtype, xavier_uniform, name=name)


def _star(one: Array, two: Array) -> Array:
    one, two = (jnp.clip(x, -CLIP, CLIP) for x in (one, two))
    return jax.nn.relu6(one) * two


def build_head(section: ConfigDict, field: str, *, dim: int, dtype: str, bn_sync: bool = False) -> Head:
    """The head of a section of the configuration (`configs.base`), which `field` names in errors.

    Raises ValueError for an unknown kind, a negative hidden size, or a dropout outside 0..1.
    """
    if section.kind not in KINDS:
        raise ValueError(f"{field}.kind is {section.kind!r}; choose from {', '.join(KINDS)}")
    if section.hidden < 0:
        raise ValueError(f"{field}.hidden is {section.hidden}; it must be at least 0")
    if not 0 <= section.dropout < 1:
        raise ValueError(f"{field}.dropout is {section.dropout}; it must be at least 0 and below 1")
    return from_config(Head, section, dim=dim, dtype=dtype, bn_sync=bn_sync)
