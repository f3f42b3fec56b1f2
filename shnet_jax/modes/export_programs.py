"""StableHLO programs of a trained model by `jax.export`: image head, text head and score, for any batch size.

A program takes the weights as its first argument, by the names that they have in model.safetensors, so that they lie
in the folder once. It runs on each of PLATFORMS, and needs JAX but neither this package nor Flax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import export

from shnet_jax.evaluation.encode import image_tower, text_tower
from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.plan import planned_run
from shnet_jax.types import Array, Batch, Embedding

PLATFORMS = ("cpu", "cuda", "tpu")
LAYOUTS = export.DisabledSafetyCheck.custom_call("LayoutConstraint")
"""XLA's own call, of which JAX gives no guarantee; products of bfloat16 on CPUs have it (ops/matmul.py)."""
SUFFIX = ".stablehlo"

Weights = Mapping[str, Array]
"""Arrays by their names in model.safetensors, as "params/image/regions_linear/kernel"."""
Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of a model, and what it takes.

    name: "image", "text" or "score". apply: (weights, *inputs) -> arrays by name.
    inputs: shapes by name of each argument after the weights; the first axis is open.
    """

    name: str
    apply: Callable[..., Any]
    inputs: tuple[dict[str, jax.ShapeDtypeStruct], ...]


def programs(run: planned_run.PlannedRun, weights: Mapping[str, Any]) -> dict[str, Program]:
    """The programs of a model by name, with numbers of images n and of texts t that stay open.

    Float features are float32 there, whatever the data set stores. weights: arrays or their shapes.
    """
    scope = export.SymbolicScope()
    sides = {
        "image": (image_tower, "n", planned_run.image_batch_shapes(run, 1)),
        "text": (text_tower, "t", planned_run.text_batch_shapes(run, 1)),
    }
    made, embedded = {}, []
    for name, (tower, letter, shapes) in sides.items():
        (rows,) = export.symbolic_shape(letter, scope=scope)
        fields = {
            field: jax.ShapeDtypeStruct((rows, *like.shape[1:]), _portable(like.dtype))
            for field, like in shapes.items()
            if field != "image_index"  # a number that no tower reads
        }
        made[name] = Program(name, functools.partial(_encode, run.model, tower), (fields,))
        with _refusal(run, name):
            embedded.append(jax.eval_shape(made[name].apply, _shapes(weights), fields))
    return made | {"score": Program("score", functools.partial(_score, run.model), tuple(embedded))}


def to_stablehlo(run: planned_run.PlannedRun, program: Program, weights: Mapping[str, Any]) -> export.Exported:
    """The program for all PLATFORMS. Raises ValueError, naming model and program, where JAX cannot export it."""
    with _refusal(run, program.name):
        exporter = export.export(jax.jit(program.apply), platforms=PLATFORMS, disabled_checks=[LAYOUTS])
        return exporter(_shapes(weights), *program.inputs)


def signature(program: Program, exported: export.Exported) -> dict[str, Any]:
    """Inputs and outputs of a program as JSON: shapes, where open axes are letters, and dtypes by name."""
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "inputs": [{name: described(like) for name, like in given.items()} for given in program.inputs],
        "outputs": {name: described(like) for name, like in outputs.items()},
    }


def described(like: Any) -> dict[str, Any]:
    """Shape, in which open axes are letters, and dtype of an array as JSON."""
    return {"shape": [size if isinstance(size, int) else str(size) for size in like.shape], "dtype": str(like.dtype)}


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params", "batch_stats"} by the names of model.safetensors."""
    return traverse_util.flatten_dict(dict(variables), sep="/")


def _portable(dtype: Any) -> Any:
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype


def _shapes(weights: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in weights.items()}


def _encode(model: RetrievalModel, tower: Callable[..., Embedding], weights: Weights, batch: Batch) -> Arrays:
    embedded = tower(model, traverse_util.unflatten_dict(weights, sep="/"), batch)
    fields = {"vector": embedded.vector, "elements": embedded.elements, "mask": embedded.mask}
    return {name: array for name, array in fields.items() if array is not None}


def _score(model: RetrievalModel, weights: Weights, images: Arrays, texts: Arrays) -> Arrays:
    params = traverse_util.unflatten_dict(weights, sep="/")["params"]
    return {"scores": scorer(model, params)(Embedding(**images), Embedding(**texts))}


@contextmanager
def _refusal(run: planned_run.PlannedRun, program: str) -> Iterator[None]:
    """Context that turns any fault of tracing into a ValueError with model, program and reason.

    A model outside this package may fail in any way that its own code does.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"the model {run.config.model.name} cannot be exported with an open batch size: {program} program: {reason}"
        ) from error
