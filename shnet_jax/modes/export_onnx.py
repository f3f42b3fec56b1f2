"""ONNX files of a trained model by jax2onnx: the text side, and the image side where ONNX Runtime runs it.

A file holds the weights, takes any number of rows and gives the unit vectors. It computes in float32, whatever
config.model.dtype and config.text.dtype are. Each file is run in ONNX Runtime and compared with JAX before it is given.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal, jaxpr_as_fun
from ml_collections import ConfigDict

from shnet_jax import registry
from shnet_jax.modes.export_programs import Program, described, programs
from shnet_jax.observe.progress import waiting
from shnet_jax.plan import planned_run

log = logging.getLogger(__name__)

SUFFIX = ".onnx"
TOLERANCE = 1e-5
"""Largest difference from JAX of a number of the vectors, which have unit length."""
ROWS = (1, 5)
"""Rows of the batches that are compared."""
CALLS = ("jit", "checkpoint", "custom_jvp_call", "custom_vjp_call")
"""Primitives that call the function that they hold."""


@dataclasses.dataclass(frozen=True)
class OnnxFile:
    """A model of ONNX as bytes. signature: shapes and dtypes by name of inputs and outputs, as in programs.json."""

    content: bytes
    signature: dict[str, Any]


def check_packages() -> None:
    """Raises ValueError where the packages that write and run ONNX are not installed."""
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--onnx needs jax2onnx and onnxruntime ({error}): pip install -e '.[onnx]'") from None


def onnx_files(run: planned_run.PlannedRun, weights: Mapping[str, Any]) -> dict[str, OnnxFile]:
    """The ONNX files of a model, by "text" and "image"; without an image side that cannot be exported, which is logged.

    weights: arrays by their names in model.safetensors.

    Raises ValueError, naming the operation, where the text side cannot be exported or gives other vectors.
    """
    run = _in_float32(run)
    made = programs(run, weights)
    files = {}
    for side in ("text", "image"):
        try:
            with waiting(f"exporting the {side} side to ONNX"):
                file = _convert(made[side], weights)
                _compare(run, made[side], weights, file.content)
            files[side] = file
        except Exception as error:  # jax2onnx and ONNX Runtime fail in many ways
            refusal = f"{side}{SUFFIX}: the {side} side of {run.config.model.name} cannot be exported: {_reason(error)}"
            if side == "text":
                raise ValueError(f"{refusal}; export without --onnx: text.stablehlo has the same inputs") from error
            log.warning("%s; left out, image.stablehlo has the same inputs", refusal)
    return files


def _in_float32(run: planned_run.PlannedRun) -> planned_run.PlannedRun:
    """The run with a model that computes in float32, and with batches of one caption for each image."""
    config = ConfigDict(run.config.to_dict())
    config.model.dtype = config.text.dtype = config.model.activation_dtype = "float32"
    config.data.resident, config.data.captions_per_image = False, 1
    return dataclasses.replace(run, config=config, model=registry.model(config.model.name).build(config))


def _convert(program: Program, weights: Mapping[str, Any]) -> OnnxFile:
    import jax2onnx

    for library in ("jax2onnx", "onnx_ir"):  # their warnings are harmless, as the comparison shows
        logging.getLogger(library).setLevel(logging.ERROR)
    (fields,) = program.inputs
    constants = {name: jnp.asarray(array) for name, array in weights.items()}

    def vector(*inputs: jax.Array) -> jax.Array:
        return program.apply(constants, dict(zip(fields, inputs, strict=True)))["vector"]

    shapes = list(fields.values())
    traced = jax.make_jaxpr(vector)(*shapes)
    simple = jax.make_jaxpr(functools.partial(_run, traced.jaxpr, traced.consts))(*shapes)
    model = jax2onnx.to_onnx(
        jaxpr_as_fun(simple), shapes, model_name=program.name, input_names=list(fields), output_names=["vector"]
    )
    inputs = {name: described(like) for name, like in fields.items()}
    return OnnxFile(
        model.SerializeToString(), {"inputs": inputs, "outputs": {"vector": described(simple.out_avals[0])}}
    )


def _compare(run: planned_run.PlannedRun, program: Program, weights: Mapping[str, Any], content: bytes) -> None:
    """Raises ValueError where ONNX Runtime gives other vectors than JAX."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for rows in ROWS:
        given = examples(run, program, rows)
        expected = np.asarray(jax.jit(program.apply)(dict(weights), given)["vector"])
        (vectors,) = session.run(["vector"], {taken.name: given[taken.name] for taken in session.get_inputs()})
        difference = np.max(np.abs(vectors - expected)) if vectors.shape == expected.shape else np.inf
        if not difference <= TOLERANCE:  # of NaN, too
            raise ValueError(f"ONNX Runtime's vectors differ from JAX's by {difference:.1e}, more than {TOLERANCE}")


def examples(run: planned_run.PlannedRun, program: Program, rows: int) -> dict[str, np.ndarray]:
    """Random inputs of a program, whose masks exclude more units row by row. run: of one caption for each image."""
    batch = planned_run.random_batch(run, rows, 0)
    fields = {name: np.asarray(batch[name], like.dtype) for name, like in program.inputs[0].items()}
    for name in fields:
        if name.endswith("_mask"):
            length = fields[name].shape[1]
            fields[name] = np.arange(length) < np.maximum(length - np.arange(rows), min(2, length))[:, None]
    if "tokens" in fields:
        fields["tokens"] = fields["tokens"] * fields["token_mask"]
    return fields


def _reason(error: Exception) -> str:
    """First line of an error, with the operation of JAX at which jax2onnx failed."""
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    at = [path.stem for path in files if "jax2onnx" in path.parts and path.parent.name == "lax"]
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return f"operation {at[-1]}: {reason}" if at else reason


def _run(jaxpr: Any, constants: Sequence[Any], *inputs: Any) -> list[Any]:
    """Computes a jaxpr by operations that jax2onnx has.

    What depends on no input is computed now, as GPO's weights by length. Functions of one's own are inlined, and scans
    unrolled: jax2onnx has no reverse ones. Of a choice by platform, the default branch is taken.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        values.update(zip(equation.outvars, _compute(equation, [read(v) for v in equation.invars]), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _compute(equation: Any, given: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    traced = [isinstance(value, jax.core.Tracer) for value in given]
    shapes = [variable.aval.shape for variable in equation.outvars]
    if name == "platform_index":
        return [np.int32(len(params["platforms"]) - 1)]
    if name == "cond" and not traced[0]:
        return _inner(params["branches"][int(given[0])])(*given[1:])
    if name in CALLS:
        return _inner(params.get("jaxpr") or params["call_jaxpr"])(*given)
    bind = functools.partial(equation.primitive.bind, *given, **equation.primitive.get_bind_params(params))
    if not any(traced) and name != "dim_as_value" and all(isinstance(size, int) for shape in shapes for size in shape):
        with jax.ensure_compile_time_eval():
            outputs = bind()
    elif name == "scan":
        return _unrolled(equation, given)
    elif name == "select_n" and given[1].dtype == bool:  # ONNX Runtime's Where has no booleans
        which, otherwise, chosen = given
        outputs = (which & chosen) | (~which & otherwise)
    elif name == "pad" and all(low >= 0 <= high and not between for low, high, between in params["padding_config"]):
        outputs = _padded(given[0], given[1], [(low, high) for low, high, _ in params["padding_config"]])
    else:
        outputs = bind()
    return outputs if equation.primitive.multiple_results else [outputs]


def _inner(jaxpr: Any) -> Callable[..., list[Any]]:
    return functools.partial(_run, getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()))


def _padded(array: Any, value: Any, edges: Sequence[tuple[int, int]]) -> Any:
    """An array with `value` around it; jax2onnx pads no array of an open number of rows."""
    for axis, edge in enumerate(edges):
        sides = [jnp.full((*array.shape[:axis], size, *array.shape[axis + 1 :]), value) for size in edge]
        array = lax.concatenate([sides[0], array, sides[1]], axis) if any(edge) else array
    return array


def _unrolled(equation: Any, given: list[Any]) -> list[Any]:
    """The steps of a scan one after the other. Its step takes constants, what it carries, and a slice of the others."""
    step, length = equation.params["jaxpr"], equation.params["length"]
    inside = getattr(step, "jaxpr", step)
    stacked = [len(a.aval.shape) > len(b.aval.shape) for a, b in zip(equation.outvars, inside.outvars, strict=True)]
    sliced = [len(a.aval.shape) > len(b.aval.shape) for a, b in zip(equation.invars, inside.invars, strict=True)]
    carries, first = stacked.count(False), sliced.count(False)
    constants, carried = given[: first - carries], given[first - carries : first]
    steps: list[list[Any]] = [[]] * length
    for i in reversed(range(length)) if equation.params["reverse"] else range(length):
        slices = [lax.index_in_dim(array, i, keepdims=False) for array in given[first:]]
        outputs = _inner(step)(*constants, *carried, *slices)
        carried, steps[i] = outputs[:carries], outputs[carries:]
    rows = ([array[None] for array in arrays] for arrays in zip(*steps, strict=True))
    return [*carried, *(lax.concatenate(arrays, 0) for arrays in rows)]
