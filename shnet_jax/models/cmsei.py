"""CMSEI-style retrieval: regions reason over a spatial and a semantic graph, then interact with the words.

After Ge et al., "Cross-modal Semantic Enhanced Interaction for Image-Sentence Retrieval", WACV 2023. No code was
published and the method section was not at hand: the structure is theirs, the formulas are a reconstruction
(docs/models.md). Results of this model are to be called "CMSEI-style".
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import RetrievalModel, TwoTowers, check_choices
from shnet_jax.models.layers import Dense, LayerNorm, from_config, torch_uniform, xavier_uniform
from shnet_jax.models.pooling import GPO
from shnet_jax.models.text import TextEncoder, VectorEncoder, build_encoder, reads_tokens, text_inputs
from shnet_jax.models.units import given_unit
from shnet_jax.ops import graphs
from shnet_jax.ops.interaction import SIDES, Interaction, default_block, interaction_scores
from shnet_jax.ops.matmul import DTYPES, einsum, matmul
from shnet_jax.ops.norms import l2norm
from shnet_jax.types import Array, Batch, Embedding

GEOMETRY_HIDDEN = 32  # of the perceptron that weighs edges by the geometry of their boxes


class GraphReasoning(nn.Module):
    """One residual layer of reasoning over a graph: V + relu(G (V Wg)) Wr, as in VSRN (Li et al., ICCV 2019)."""

    dtype: str

    @nn.compact
    def __call__(self, nodes: Array, graph: Array) -> Array:
        """nodes [n, K, d]; graph [n, K, K], or [n, K, K, H] with edges of its own for each of H parts of d."""
        n, k, d = nodes.shape
        messages = matmul(nodes, self.param("gather", torch_uniform(d), (d, d)), self.dtype).astype(nodes.dtype)
        heads = graph.shape[3] if graph.ndim == 4 else 1
        graph = graph.reshape(n, k, k, heads)
        mixed = einsum("nijh,njhd->nihd", graph, messages.reshape(n, k, heads, d // heads), self.dtype)
        mixed = jax.nn.relu(mixed).reshape(n, k, d).astype(nodes.dtype)
        return nodes + matmul(mixed, self.param("out", torch_uniform(d), (d, d)), self.dtype).astype(nodes.dtype)


class GeometryHeads(nn.Module):
    """Edge weights in 0..1 for each head, from the relative position of the two boxes (ours)."""

    heads: int

    @nn.compact
    def __call__(self, boxes: Array) -> Array:
        """boxes [n, K, 4] -> [n, K, K, heads]."""
        hidden = jax.nn.relu(Dense(GEOMETRY_HIDDEN, name="in")(graphs.pair_geometry(boxes)))
        return jax.nn.sigmoid(Dense(self.heads, name="out")(hidden))


class Gates(nn.Module):
    """Projections of the elements for the gates of the refinement, computed once per item: [X, B X, A X].

    A: matrix of the gate that refines X. B: matrix of the gate that refines the other side, which attends to X.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [n, m, d] -> [n, m, 3 d] float32."""
        d = x.shape[-1]
        init = torch_uniform(2 * d)  # of one gate's two matrices together
        parts = [matmul(x, self.param(name, init, (d, d)), self.dtype) for name in ("other_gate", "own_gate")]
        return jnp.concatenate([x.astype(jnp.float32), *parts], axis=-1)


class ImageEncoder(nn.Module):
    """Regions, enhanced by both graphs. Attributes are those of `config.model` and `config.model.cmsei`."""

    dim: int
    spatial_graph: bool
    semantic_graph: bool
    iou_threshold: float
    relation_threshold: float
    geometry_heads: int
    feature_dropout: float
    dtype: str
    activation_dtype: str = "float32"

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> tuple[Array, Array, Array]:
        """Image fields of `batch` -> regions [n, K, dim], their mask [n, K], unit vectors [n, dim]."""
        x, mask = given_unit(batch, "regions", self.activation_dtype)
        x = nn.Dropout(self.feature_dropout, deterministic=not train)(x)
        projected = Dense(self.dim, self.dtype, xavier_uniform, name="regions_linear")(x)
        self.sow("intermediates", "projected", projected)
        reasoned = []
        if self.spatial_graph:
            reasoned.append(GraphReasoning(self.dtype, name="spatial")(projected, self._spatial(batch, mask)))
        if self.semantic_graph:
            graph = graphs.normalised(self._semantic(batch, mask.shape[1]), mask)
            reasoned.append(GraphReasoning(self.dtype, name="semantic")(projected, graph))
        enhanced = projected
        if reasoned:
            self.sow("intermediates", "reasoned", reasoned)
            enhanced = Dense(self.dim, self.dtype, name="combine")(jnp.concatenate(reasoned, axis=-1)) + projected
        enhanced = LayerNorm(epsilon=1e-5, name="norm")(enhanced)
        return enhanced, mask, l2norm(GPO(name="pool")(enhanced, mask))

    def _spatial(self, batch: Batch, mask: Array) -> Array:
        boxes = batch["boxes"].astype(jnp.float32)
        graph = graphs.normalised(graphs.overlap_graph(boxes, self.iou_threshold), mask)
        if not self.geometry_heads:
            return graph
        return graph[..., None] * GeometryHeads(self.geometry_heads, name="geometry")(boxes)

    def _semantic(self, batch: Batch, regions: int) -> Array:
        """The graph of the scene; of a data set that knows none, no edges: self-loops are all that is left."""
        if "relation_scores" in batch:
            return graphs.confident_graph(batch["relation_scores"], self.relation_threshold)
        if "relations" in batch:
            return graphs.relation_graph(batch["relations"], regions)
        return jnp.zeros((batch["regions"].shape[0], regions, regions), bool)


class Globals(TwoTowers):
    """Both towers; the score is the dot product of their global vectors, as there is no cross-attention."""

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_image`."""
        return Embedding(self.image(batch, train=train)[2])


class CMSEI(RetrievalModel):
    """Towers whose elements meet in the score; `Embedding.elements` are [X, B X, A X] (`Gates`), X without refinement.

    The score itself has no parameters: what is multiplied by one is multiplied once for each region and word, there.
    """

    image: ImageEncoder
    text: TextEncoder | VectorEncoder
    how: Interaction
    dtype: str

    def setup(self) -> None:
        """Creates the gates' matrices of the image and the text side."""
        if self.how.refine:
            self.image_gates, self.text_gates = Gates(self.dtype), Gates(self.dtype)

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_image`."""
        regions, mask, vector = self.image(batch, train=train)
        return Embedding(vector, self.image_gates(regions) if self.how.refine else regions.astype(jnp.float32), mask)

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_text`."""
        words = self.text(*text_inputs(batch), train=train, with_elements=True)
        if words.elements is None:
            return words
        elements = self.text_gates(words.elements) if self.how.refine else words.elements.astype(jnp.float32)
        return dataclasses.replace(words, elements=elements)

    def score(self, images: Embedding, texts: Embedding) -> Array:  # type: ignore[override]  # a method: see contract
        """Scores [n, t] of every image with every text; see `ops.interaction`."""
        return interaction_scores(images, texts, self.how)


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    """Image fields that the model of this configuration needs in a record."""
    return ("regions", "boxes") if config.model.cmsei.spatial_graph else ("regions",)


def optional_fields(config: ConfigDict) -> dict[str, str]:
    """Fields of which the model reads the first that a data set has: {field: consequence of having none}."""
    if not config.model.cmsei.semantic_graph:
        return {}
    return dict.fromkeys(("relation_scores", "relations"), "the semantic graph is the identity")


def build(config: ConfigDict) -> CMSEI | Globals:
    """Builds the model of a configuration whose `text.vocab_size` is known.

    Raises ValueError for a field of `config.model` or `config.text` that is none of its choices.
    """
    m, c = config.model, config.model.cmsei
    check_choices(config, {"cmsei.attend": SIDES, "dtype": DTYPES, "activation_dtype": DTYPES})
    if len(set(c.attend)) < len(c.attend):
        raise ValueError(f"config.model.cmsei.attend is {tuple(c.attend)}; choose from {', '.join(SIDES)}, each once")
    if tuple(m.units) != ("regions",):
        raise ValueError(
            f"config.model.units is {tuple(m.units)}; the graphs of CMSEI-style models are over regions only"
        )
    if c.block < 0 or len(c.sharpness) != 2:
        raise ValueError(
            f"config.model.cmsei: block is {c.block}, at least 0 is expected; sharpness is {tuple(c.sharpness)}, "
            "expected one of objects and one of words"
        )
    if c.geometry_heads and m.dim % c.geometry_heads:
        raise ValueError(f"config.model.cmsei.geometry_heads is {c.geometry_heads}, model.dim {m.dim}: it must divide")
    shared = {name: m[name] for name in ("dim", "feature_dropout", "dtype", "activation_dtype")}
    image = from_config(ImageEncoder, c, **shared)
    text = build_encoder(config)
    if c.attend and not reads_tokens(config):
        raise ValueError(
            "config.text.source is 'caption_embeddings', one vector a caption, and config.model.cmsei.attend needs "
            "words: store caption_tokens and set text.source to it, or set attend to ()"
        )
    if not c.attend:
        return Globals(image=image, text=text)
    how = Interaction(
        attend=tuple(c.attend),
        refine=c.refine,
        sharpness=tuple(c.sharpness),
        cross_sharpness=c.cross_sharpness,
        local=c.local_weight,
        cross=c.cross_weight,
        whole=c.global_weight,
        block=c.block or default_block(jax.default_backend()),
        dtype=m.dtype,
    )
    return CMSEI(image=image, text=text, how=how, dtype=m.dtype)
