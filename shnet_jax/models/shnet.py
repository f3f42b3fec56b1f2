"""3SHNet: segmentation-guided semantic and spatial self-highlighting (Ge et al., IPM 61(4), 2024).

With both branches and both extra token kinds off it is VSE-infinity (Chen et al., CVPR 2021): projected units and GPO.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import TwoTowers, check_choices
from shnet_jax.models.fusion import MAP_CODES, MAP_INPUTS, SegEmbed, SemanticHighlight, SpatialHighlight
from shnet_jax.models.layers import Dense, from_config
from shnet_jax.models.pooling import GPO
from shnet_jax.models.text import build_encoder
from shnet_jax.models.units import UNIT_MASKS, UnitEncoder, Units, build_mlp
from shnet_jax.ops.matmul import DTYPES
from shnet_jax.ops.norms import l2norm
from shnet_jax.types import DATA, Array, Batch


class ImageEncoder(UnitEncoder, kw_only=True):
    """The visual tower. Attributes are those of `config.model` (configs/base.py)."""

    semantic: bool
    spatial: bool
    scene_tokens: bool
    category_token: bool
    global_residual: bool
    num_classes: int
    map_channels: int
    map_input: str
    map_position: str
    spatial_scale: float
    dropout: float
    axis: str | None

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> Array:
        """Image fields of `batch` -> unit vectors [n, dim]."""
        units = self.project(batch, train=train)
        self.sow("intermediates", "linear", units.linear)
        self.sow("intermediates", "projected", units.projected)
        tokens, masks = [units.projected], [units.mask]
        if self.semantic or self.spatial:
            tokens.append(self._highlight(units, batch, train))
            masks.append(units.mask)
        if self.scene_tokens:
            tokens.append(self._scene(batch["seg_semantic"].astype(self.activation_dtype), train))
            masks.append(jnp.ones(tokens[-1].shape[:2], bool))
        if self.category_token:
            embed = SegEmbed(self.dim, self.dropout, self.dtype, name="category")
            category = embed(batch["categories"].astype(jnp.float32), train=train)
            self.sow("intermediates", "category_features", category)
            tokens.append(category[:, None, :].astype(self.activation_dtype))
            masks.append(jnp.ones((category.shape[0], 1), bool))

        pooled_set, pooled_mask = jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)
        self.sow("intermediates", "pooled_set", pooled_set)
        self.sow("intermediates", "pooled_mask", pooled_mask)
        pooled = GPO(name="pool")(pooled_set, pooled_mask)
        self.sow("intermediates", "pooled", pooled)
        if self.global_residual:
            # Normalise both first, so that neither dominates the other, whatever model the vector comes from.
            vector = l2norm(batch["image_embedding"].astype(jnp.float32))
            pooled = l2norm(pooled) + Dense(self.dim, dtype=self.dtype, name="global_linear")(vector)
        return l2norm(pooled)

    def _highlight(self, units: Units, batch: Batch, train: bool) -> Array:
        """Units highlighted by the classes of the scene, by the label map or by both, [n, N, dim]."""
        highlighted = []
        if self.semantic:
            semantic = SemanticHighlight(self.dim, self.dropout, self.mlp, self.dtype, name="semantic")
            shares = batch["seg_semantic"].astype(jnp.float32)
            highlighted.append(semantic(units.linear, units.mask, shares, train=train))
            self.sow("intermediates", "semantic_features", highlighted[-1])
        if self.spatial:
            spatial = SpatialHighlight(
                dim=self.dim,
                channels=self.map_channels,
                scale=self.spatial_scale,
                num_classes=self.num_classes,
                map_input=self.map_input,
                map_position=self.map_position,
                mlp=self.mlp,
                axis=self.axis,
                dtype=self.dtype,
                name="spatial",
            )
            highlighted.append(spatial(units.linear, units.mask, batch["seg_map"], train=train))
            self.sow("intermediates", "spatial_features", highlighted[-1])
        fused = self.unit_mlp("fusion_mlp")(sum(highlighted) + units.projected, units.mask, train=train)
        self.sow("intermediates", "fused", fused)
        return fused

    def _scene(self, shares: Array, train: bool) -> Array:
        """Tokens [n, h * w, dim] of the class shares [n, C, h, w]."""
        cells = shares.reshape(*shares.shape[:2], -1).swapaxes(1, 2)
        scene = SegEmbed(self.dim, self.dropout, self.dtype, name="scene")(cells, train=train)
        self.sow("intermediates", "scene_linear", scene)
        scene = self.unit_mlp("scene_mlp")(scene, train=train) + scene
        self.sow("intermediates", "scene_features", scene)
        return scene


class SHNet(TwoTowers):
    """3SHNet with any text tower; the score is the dot product of unit vectors."""

    image: ImageEncoder

    @property
    def norm_depth(self) -> int:
        """See `RetrievalModel.norm_depth`: units, highlighting, fusion; within VSpM one MLP follows another."""
        return max(3 if self.image.spatial else 2 if self.image.semantic else 1, super().norm_depth)


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    """Fields of the record that the model of this configuration reads."""
    m = config.model
    fields = list(m.units)
    if m.semantic or m.scene_tokens:
        fields.append("seg_semantic")
    if m.spatial:
        fields.append("seg_map")
    if m.category_token:
        fields.append("categories")
    if m.global_residual:
        fields.append("image_embedding")
    return tuple(fields)


def build(config: ConfigDict) -> SHNet:
    """Builds the model of a configuration whose `text.vocab_size` is known.

    Raises ValueError for a field of `config.model` or `config.text` that is none of its choices.
    """
    m = config.model
    check_choices(config, {"units": UNIT_MASKS, "map_input": MAP_INPUTS, "map_position": tuple(MAP_CODES)})
    check_choices(config, {"dtype": DTYPES, "activation_dtype": DTYPES})
    axis = DATA if m.bn_sync else None
    image = from_config(ImageEncoder, m, units=tuple(m.units), mlp=build_mlp(m), axis=axis)
    return SHNet(image=image, text=build_encoder(config))
