"""3SHNet: segmentation-guided semantic and spatial self-highlighting (Ge et al., IPM 61(4), 2024).

With both branches and both extra token kinds off it is VSE-infinity (Chen et al., CVPR 2021): projected units and GPO.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.fusion import MAP_CODES, MAP_INPUTS, SegEmbed, SemanticHighlight, SpatialHighlight
from shnet_jax.models.layers import Dense, xavier_uniform
from shnet_jax.models.mlp import MLP
from shnet_jax.models.pooling import GPO
from shnet_jax.models.text import TextEncoder, build_tower
from shnet_jax.ops.matmul import DTYPES
from shnet_jax.ops.norms import l2norm
from shnet_jax.types import DATA, Array, Batch, Embedding

UNIT_MASKS = {"regions": "region_mask", "grid": "grid_mask"}


def given_unit(batch: Batch, unit: str) -> tuple[Array, Array]:
    """Features [n, K, D] float32 of one kind of visual unit and their mask [n, K]; without a mask, all are valid."""
    x, mask = batch[unit].astype(jnp.float32), batch.get(UNIT_MASKS[unit])
    return x, jnp.ones(x.shape[:2], bool) if mask is None else mask


class ImageEncoder(nn.Module):
    """The visual tower. Attributes are those of `config.model` (configs/base.py)."""

    dim: int
    units: tuple[str, ...]
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
    feature_dropout: float
    mlp: partial
    axis: str | None
    dtype: str

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> Array:
        """Image fields of `batch` -> unit vectors [n, dim]."""
        linear, projected, mask = self._units(batch, train)
        self.sow("intermediates", "linear", linear)
        self.sow("intermediates", "projected", projected)
        tokens, masks = [projected], [mask]

        highlighted = []
        if self.semantic:
            semantic = SemanticHighlight(self.dim, self.dropout, self.mlp, self.dtype, name="semantic")
            highlighted.append(semantic(linear, mask, batch["seg_semantic"].astype(jnp.float32), train=train))
            self.sow("intermediates", "semantic_features", highlighted[-1])
        if self.spatial:
            spatial = SpatialHighlight(
                self.dim,
                self.map_channels,
                self.spatial_scale,
                self.num_classes,
                self.map_input,
                self.map_position,
                self.mlp,
                self.axis,
                self.dtype,
                name="spatial",
            )
            highlighted.append(spatial(linear, mask, batch["seg_map"], train=train))
            self.sow("intermediates", "spatial_features", highlighted[-1])
        if highlighted:
            fused = self._mlp("fusion_mlp")(sum(highlighted) + projected, mask, train=train)
            self.sow("intermediates", "fused", fused)
            tokens.append(fused)
            masks.append(mask)

        n = mask.shape[0]
        if self.scene_tokens:
            cells = batch["seg_semantic"].astype(jnp.float32)
            cells = cells.reshape(n, cells.shape[1], -1).swapaxes(1, 2)
            scene = SegEmbed(self.dim, self.dropout, self.dtype, name="scene")(cells, train=train)
            self.sow("intermediates", "scene_linear", scene)
            scene = self._mlp("scene_mlp")(scene, train=train) + scene
            self.sow("intermediates", "scene_features", scene)
            tokens.append(scene)
            masks.append(jnp.ones(scene.shape[:2], bool))
        if self.category_token:
            category = SegEmbed(self.dim, self.dropout, self.dtype, name="category")(
                batch["categories"].astype(jnp.float32), train=train
            )
            self.sow("intermediates", "category_features", category)
            tokens.append(category[:, None, :])
            masks.append(jnp.ones((n, 1), bool))

        pooled_set, pooled_mask = jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)
        self.sow("intermediates", "pooled_set", pooled_set)
        self.sow("intermediates", "pooled_mask", pooled_mask)
        pooled = GPO(name="pool")(pooled_set, pooled_mask)
        self.sow("intermediates", "pooled", pooled)
        if self.global_residual:
            # Both of unit length first: neither drowns the other, whatever model the vector comes from.
            vector = l2norm(batch["image_embedding"].astype(jnp.float32))
            pooled = l2norm(pooled) + Dense(self.dim, dtype=self.dtype, name="global_linear")(vector)
        return l2norm(pooled)

    def _mlp(self, name: str) -> MLP:
        return self.mlp(self.dim // 2, self.dim, name=name)

    def _units(self, batch: Batch, train: bool) -> tuple[Array, Array, Array]:
        """Every visual unit's linear features, those plus their MLP ([n, N, dim] both) and the mask [n, N]."""
        linears, projecteds, masks = [], [], []
        for unit in self.units:
            x, mask = given_unit(batch, unit)
            x = nn.Dropout(self.feature_dropout, deterministic=not train)(x)
            linear = Dense(self.dim, dtype=self.dtype, kernel_init=xavier_uniform, name=f"{unit}_linear")(x)
            linears.append(linear)
            projecteds.append(linear + self._mlp(f"{unit}_mlp")(x, mask, train=train))
            masks.append(mask)
        return (jnp.concatenate(linears, 1), jnp.concatenate(projecteds, 1), jnp.concatenate(masks, 1))


class SHNet(RetrievalModel):
    """3SHNet with any text tower; the score is the dot product of unit vectors."""

    image: ImageEncoder
    text: TextEncoder

    @property
    def norm_depth(self) -> int:
        """See `RetrievalModel.norm_depth`: units, highlighting, fusion; within VSpM one MLP follows another."""
        return 3 if self.image.spatial else 2 if self.image.semantic else 1

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_image`."""
        return Embedding(self.image(batch, train=train))

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_text`."""
        return self.text(batch["tokens"], batch["token_mask"], train=train)


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
    unknown = [u for u in m.units if u not in UNIT_MASKS]
    if unknown or not m.units:
        raise ValueError(f"config.model.units is {tuple(m.units)}; choose from {', '.join(UNIT_MASKS)}")
    for field, choices in (("map_input", MAP_INPUTS), ("map_position", tuple(MAP_CODES)), ("dtype", DTYPES)):
        if m[field] not in choices:
            raise ValueError(f"config.model.{field} is {m[field]!r}; choose from {', '.join(choices)}")
    axis = DATA if m.bn_sync else None
    mlp = partial(MLP, dtype=m.dtype, include_padding=m.bn_include_padding, axis=axis)
    image = ImageEncoder(
        dim=m.dim,
        units=tuple(m.units),
        semantic=m.semantic,
        spatial=m.spatial,
        scene_tokens=m.scene_tokens,
        category_token=m.category_token,
        global_residual=m.global_residual,
        num_classes=m.num_classes,
        map_channels=m.map_channels,
        map_input=m.map_input,
        map_position=m.map_position,
        spatial_scale=m.spatial_scale,
        dropout=m.dropout,
        feature_dropout=m.feature_dropout,
        mlp=mlp,
        axis=axis,
        dtype=m.dtype,
    )
    return SHNet(image=image, text=TextEncoder(tower=build_tower(config), dim=m.dim, dtype=config.text.dtype))
