"""Caption encoding with the layers of the text tower spread over devices, for towers larger than one device.

The model's own code runs, with one step of its tower, `run_layers`, replaced by a pipeline; what comes before (the
embedding) and after (head, pooling) is done by every device on its own captions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.axis import all_gather, sum_scatter
from shnet_jax.parallel.mapping import Mapped, grid_mesh, map_specs, replicate
from shnet_jax.parallel.pipeline import STAGE, bubble_share, layer_places, pipeline, place_layers
from shnet_jax.types import DATA, Array, Batch, Embedding


@runtime_checkable
class LayeredTower(Protocol):
    """A text tower of equal layers, whose parameters are layer_0, layer_1, ...; see `models.bert`."""

    layers: int

    def make_layer(self, name: str | None = None) -> nn.Module:
        """A layer, called as `layer(x, mask, train=train)`."""
        ...

    def run_layers(self, x: Array, mask: Array, *, train: bool) -> Array:
        """All layers, one after another."""
        ...


class Placed(NamedTuple):
    """Variables placed on a mesh.

    shared: all but the layers of the text tower, on every device; enough for `encode_image`.
    layers: the layers stacked, each leaf [stages * places, ...]; a device holds those of its stage.
    """

    shared: Any
    layers: Any


def stage_mesh(mesh: Mesh, stages: int) -> Mesh:
    """The devices of a mesh, in their order, as `DATA` x `STAGE`; the stages of a pipeline are neighbours."""
    if stages < 1 or mesh.size % stages:
        raise ValueError(f"config.eval.stages is {stages}, which does not divide the {mesh.size} devices used")
    return grid_mesh(list(mesh.devices.flat), {DATA: mesh.size // stages, STAGE: stages})


def place_variables(model: RetrievalModel, variables: Mapping[str, Any], mesh: Mesh) -> Placed:
    """Puts {"params", ...}, on the host or on devices, on a mesh of `DATA` x `STAGE`.

    Raises ValueError for a text tower without layers or with fewer layers than stages.
    """
    rest, layers = _apart(model, variables)
    placed = place_layers(layers, mesh)
    return Placed(replicate(rest, mesh), placed)


def placed_shapes(model: RetrievalModel, variables: Mapping[str, Any], mesh: Mesh) -> Placed:
    """Shapes, dtypes and shardings of what `place_variables` gives. variables: arrays or their shapes."""
    rest, layers = _apart(model, variables)
    places = layer_places(len(layers), mesh)

    def shape(leaf: Any, lead: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec))

    return Placed(
        jax.tree.map(lambda leaf: shape(leaf, (), P()), rest),
        jax.tree.map(lambda leaf: shape(leaf, (places * mesh.shape[STAGE],), P(STAGE)), layers[0]),
    )


def _apart(model: RetrievalModel, variables: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The variables without the layers of the text tower, and these."""
    params = variables["params"]
    tower = dict(params["text"]["tower"])
    layers = [tower.pop(f"layer_{i}") for i in range(_tower(model).layers)]
    return {**variables, "params": {**params, "text": {**params["text"], "tower": tower}}}, layers


def check_pipeline(model: RetrievalModel, mesh: Mesh, microbatches: int, rows: int) -> None:
    """Static checks, before I/O or compilation. rows: captions of a batch on each device.

    Raises ValueError for a text tower without layers or with fewer than stages, or for captions of a pipeline that do
    not divide into microbatches.
    """
    layer_places(_tower(model).layers, mesh)
    _check_rows(rows * mesh.shape[STAGE], microbatches)


def schedule_text(stages: int, microbatches: int) -> str:
    """The cost of a pipeline, in a line for a log or a table."""
    idle = f"{100 * bubble_share(microbatches, stages):.1f} %"
    return f"text tower in {stages} stages, microbatches: {microbatches}; a stage is idle for {idle} of the ticks"


def make_pipelined_text_encoder(model: RetrievalModel, mesh: Mesh, microbatches: int) -> Mapped:
    """Compiles `encode(placed, batch) -> Embedding`, equal to `encode_text` up to rounding.

    Args:
      model: one whose text tower is at `model.text.tower` and has layers (bert, transformer, clip).
      mesh: of `DATA` x `STAGE`, see `stage_mesh`.
      microbatches: parts of the captions of one pipeline that follow each other; `pipeline.bubble_share` says what
        few of them cost.

    Returns:
      A function of `place_variables(...)` and the text fields of a batch [t, ...], NumPy or as `mapping.put_batch`
      gives them, t a multiple of the devices. Rows come in the order of the batch, and as by `mapping.map_encode`:
      spread over the devices; with several processes, all of them to each.

    Raises:
      ValueError: a text tower without layers; when called, captions that do not divide into microbatches
        (`check_pipeline` says it before).
    """
    tower = _tower(model)
    layer = tower.make_layer()

    def apply_layer(params: Any, x: Array, mask: Array) -> Array:
        return cast(Array, layer.apply({"params": params}, x, mask, train=False))

    def run_layers(layers: Any, x: Array, mask: Array) -> Array:
        # The captions of all stages of this pipeline go through it together; then each stage has its own again.
        x_parts, mask_parts = (_split(a, microbatches) for a in all_gather((x, mask), STAGE))
        out = pipeline(apply_layer, layers, x_parts, mask_parts, STAGE, tower.layers)
        return sum_scatter(out.reshape(-1, *x.shape[1:]), STAGE)

    def encode(placed: Placed, batch: Batch) -> Embedding:
        def instead(run: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if context.method_name == "run_layers" and context.module.path == ("text", "tower"):
                return run_layers(placed.layers, *args)
            return run(*args, **kwargs)

        with nn.intercept_methods(instead):
            embedding = cast(Embedding, model.apply(placed.shared, batch, train=False, method="encode_text"))
        return all_gather(all_gather(embedding, STAGE), DATA) if everywhere else embedding

    everywhere = jax.process_count() > 1
    rows = P((DATA, STAGE))
    return map_specs(encode, mesh, (Placed(P(), P(STAGE)), rows), P() if everywhere else rows)


def _tower(model: RetrievalModel) -> LayeredTower:
    tower = getattr(getattr(model, "text", None), "tower", None)
    if not isinstance(tower, LayeredTower):
        actual = "no text.tower" if tower is None else f"the text tower {type(tower).__name__}, which has no layers"
        raise ValueError(
            f"config.eval.stages spreads the layers of the text tower over devices, but {type(model).__name__} has "
            f"{actual}; set it to 1, or config.text.tower to bert, transformer or clip"
        )
    return tower


def _check_rows(rows: int, microbatches: int) -> None:
    if microbatches < 1:
        raise ValueError(f"config.eval.microbatches is {microbatches}; it must be at least 1")
    if rows % microbatches:
        raise ValueError(
            f"config.eval.microbatches is {microbatches}, which does not divide the {rows} captions of "
            "a pipeline (config.eval.batch_size * config.eval.stages)"
        )


def _split(x: Array, microbatches: int) -> Array:
    _check_rows(x.shape[0], microbatches)
    return x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])
