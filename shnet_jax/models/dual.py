"""Head on the vectors of a pretrained dual encoder: its own cosine, or that with a learned residual on each side.

The image side is `image_embedding` of the record, which the encoder's vision tower gave; the text side is the encoder's
text tower. Without a head this is the encoder's zero-shot search. The residual head, x + linear(x) from linear = 0,
begins as exactly that; it is a linear form of CLIP-Adapter (Gao et al., IJCV 2024).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import RetrievalModel, check_choices
from shnet_jax.models.esa import EndToken
from shnet_jax.models.text import build_tower
from shnet_jax.ops.matmul import DTYPES, DType, matmul
from shnet_jax.ops.norms import l2norm
from shnet_jax.types import Array, Batch, Embedding

HEADS = ("none", "residual")
ENCODERS = ("clip", "siglip")
"""Text towers of dual encoders; both give their global vector at the last valid token."""


class Residual(nn.Module):
    """Unit vectors in the direction of x + x @ kernel, where the kernel is zero at first. dtype: of the operands."""

    dtype: DType = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [n, d], of unit length -> [n, d] float32."""
        kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], x.shape[-1]))
        return l2norm(x + matmul(x, kernel, self.dtype))


class Dual(RetrievalModel):
    """Image vectors of the record, text vectors of a tower, and a head on each side or on none.

    Attributes:
      text: gives the tower's global vector of a caption.
      dim: width of the joint space.
      image_head, text_head: both None for the encoder's own vectors.
    """

    text: EndToken
    dim: int
    image_head: Residual | None
    text_head: Residual | None

    @property
    def activation_dtype(self) -> str:
        """See `RetrievalModel.activation_dtype`; the image side has no layers, the text tower has."""
        return str(self.text.tower.activation_dtype)

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_image`. Raises ValueError for an `image_embedding` of another width."""
        given = batch["image_embedding"]
        if given.shape[-1] != self.dim:
            raise ValueError(
                f"the data set's image_embedding is {given.shape[-1]} wide, the joint space of the text tower "
                f"{self.dim}: extract it with the dual encoder that config.text.weights has"
            )
        vector = l2norm(given.astype(jnp.float32))
        return Embedding(vector if self.image_head is None else self.image_head(vector))

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_text`."""
        vector = self.text(batch["tokens"], batch["token_mask"], train=train).vector
        return Embedding(vector if self.text_head is None else self.text_head(vector))


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    """Fields of the record that the model of this configuration reads."""
    return ("image_embedding",)


def build(config: ConfigDict) -> Dual:
    """Builds the model of a configuration whose `text.vocab_size` is known.

    Raises ValueError for a head that is none of HEADS, a text tower without a joint space, or an unknown dtype.
    """
    check_choices(config, {"dual.head": HEADS, "dtype": DTYPES, "activation_dtype": DTYPES})
    if config.text.tower not in ENCODERS:
        raise ValueError(
            f"config.text.tower is {config.text.tower!r}; the model dual has that of its encoder, "
            + " or ".join(ENCODERS)
        )
    head = config.model.dual.head == "residual"
    return Dual(
        text=EndToken(build_tower(config)),
        dim=config.text.projection,
        image_head=Residual(config.model.dtype) if head else None,
        text_head=Residual(config.model.dtype) if head else None,
    )
