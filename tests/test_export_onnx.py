"""ONNX files of `shnet export --onnx`: vectors of ONNX Runtime equal JAX's, what is not ONNX is refused.

jax2onnx and ONNX Runtime are no part of `make setup`; `make test-onnx` installs them and runs this file.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

from configs import align, esa, scenes
from shnet_jax.evaluation.encode import image_tower, text_tower
from shnet_jax.modes import export_onnx
from shnet_jax.modes.export import SUMS, export_run
from shnet_jax.modes.export_onnx import onnx_files
from shnet_jax.modes.export_programs import programs
from shnet_jax.plan import planned_run
from shnet_jax.types import Embedding
from tests import test_export
from tests.test_export import SMALL, inputs, random_weights, toy, trained

MISSING = [name for name in ("jax2onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not installed: make test-onnx")

SMALL_ALIGN = functools.partial(align.get_config, "small")
UNITS = {"model.align.source": "units", "model.units": ("regions", "grid")}
SETS = {"model.esa.size": 2, "model.esa.text_size": 3, "model.esa.depth": 1, "model.esa.heads": 2}
TOWERS = {"bert": {}, "bigru": {}, "transformer": {}, "clip": {"text.projection": 8}, "siglip": {"text.projection": 8}}
CASES = {
    **test_export.MODELS,
    **{
        f"align, {kind}": (
            SMALL_ALIGN,
            {f"{side}.head.{field}": value for side in ("text", "model.align") for field, value in head.items()},
        )
        for kind in ("star", "linear", "swiglu", "sharelock", "none")
        for head in [{"kind": kind, "hidden": 0 if kind == "none" else 16}]
    },
    **{
        f"align, {pool}, {first}": (SMALL_ALIGN, UNITS | {"model.align.pool": pool, "model.align.pool_first": first})
        for pool in ("mean", "gpo", "attention")
        for first in (True, False)
    },
    "align, vectors of tokens": (SMALL_ALIGN, {"text.source": "caption_tokens"}),
    "align, units": (functools.partial(align.get_config, "small,units"), {}),
    "shnet, vectors of tokens": (scenes.get_config, {"text.tower": "vectors", "text.source": "caption_tokens"}),
    **{f"shnet, {tower}": (scenes.get_config, {"text.tower": tower} | sizes) for tower, sizes in TOWERS.items()},
    "shnet, bfloat16 activations": (scenes.get_config, {"model.activation_dtype": "bfloat16"}),
    "user, guides": (test_export.MODELS["user"][0], {"model.name": "user", "model.user.guides": ("sge", "cge")}),
    "shnet without segmentation": (
        scenes.get_config,
        {f"model.{field}": False for field in ("semantic", "spatial", "scene_tokens", "category_token")},
    ),
    "dual, siglip": (
        test_export.MODELS["dual"][0],
        {"text.tower": "siglip", "text.projection": 8, "text.frozen_layers": 0},
    ),
    "esa, merge": (esa.get_config, SETS | {"model.esa.mode": "merge"}),
    "esa, picture": (
        esa.get_config,
        SETS
        | {"model.esa.source": "picture", "model.esa.head": "none", "text.tower": "clip", "text.projection": 8}
        | {"model.clip.layers": 1, "model.clip.width": 8, "model.clip.heads": 2, "model.clip.mlp_dim": 8}
        | {"model.clip.projection": 8},
    ),
}


def planned(case: str) -> planned_run.PlannedRun:
    get_config, changes = CASES[case]
    config = get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return planned_run.describe(config)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_vectors_equal_those_of_jax_in_float32(case, caplog):
    """For every model and text tower, both sides, whatever precision the model has."""
    import onnxruntime

    run = planned(case)
    weights = random_weights(run)
    files = onnx_files(run, weights)
    assert files.keys() == {"text", "image"}, caplog.text
    run = export_onnx._in_float32(run)
    made = programs(run, weights)
    variables = {"params": {}, "batch_stats": {}}
    variables |= test_export.traverse_util.unflatten_dict(weights, sep="/")
    for side, tower in {"text": text_tower, "image": image_tower}.items():
        session = onnxruntime.InferenceSession(files[side].content)
        described = {taken.name: taken.shape for taken in session.get_inputs()}
        assert described == {name: like["shape"] for name, like in files[side].signature["inputs"].items()}
        for rows in (2, 9):
            given = inputs(run, made[side].inputs[0], rows)
            (found,) = session.run(["vector"], given)
            expected = jax.jit(functools.partial(tower, run.model))(variables, given).vector
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert found.std(axis=0).max() > 1e-4  # of rows that differ


def test_every_model_is_tried():
    assert test_export.MODELS.keys() <= CASES.keys()


@needs_onnx
@pytest.mark.slow
def test_a_published_folder_has_the_files_and_tells_of_them(tmp_path):
    import onnxruntime

    folder = tmp_path / "published"
    export_run(toy(), trained(), str(folder), onnx=True)
    about = json.loads((folder / "programs.json").read_text("utf-8"))
    card, sums = ((folder / name).read_text("utf-8") for name in ("README.md", SUMS))
    assert about["onnx"].keys() == {"text", "image"} and "- onnx\n" in card
    for side in ("text", "image"):
        session = onnxruntime.InferenceSession(folder / f"{side}.onnx")
        entry = about["onnx"][side]
        assert entry["file"] == f"{side}.onnx" and f"  {side}.onnx\n" in sums
        assert {taken.name: taken.shape for taken in session.get_inputs()} == {
            name: like["shape"] for name, like in entry["inputs"].items()
        }
        assert [given.name for given in session.get_outputs()] == [*entry["outputs"]] == ["vector"]
        assert str(tmp_path.parent).encode() not in (folder / f"{side}.onnx").read_bytes()
    assert "| text.onnx " in card and "| `vector` [t, 16] float32 |" in card
    assert "| `tokens` [t, 32] int32; `token_mask` [t, 32] bool " in card


@needs_onnx
@pytest.mark.slow
def test_vectors_that_differ_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "TOLERANCE", -1.0)
    with pytest.raises(
        ValueError, match=r"^text\.onnx: .* vectors differ from JAX's by .*; export without --onnx: text\.stablehlo"
    ):
        export_run(toy(), trained(), str(tmp_path / "published"), onnx=True)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


unknown = Primitive("unknown_operation")
unknown.def_abstract_eval(lambda x: x)
unknown.def_impl(lambda x: x)


@needs_onnx
@pytest.mark.parametrize("side", ["text", "image"])
def test_an_operation_that_is_not_onnx_is_named(side, monkeypatch, caplog):
    """The text side is refused, and the image side left out."""
    run = planned("align, none")
    module = sys.modules["shnet_jax.models.align"]
    method = f"encode_{side}"
    own = getattr(module.Align, method)

    def encode(self, batch, *, train):
        return Embedding(unknown.bind(own(self, batch, train=train).vector))

    monkeypatch.setattr(module.Align, method, encode)
    refused = rf"^{side}\.onnx: the {side} side of align cannot be exported: .*unknown_operation"
    if side == "text":
        with pytest.raises(ValueError, match=refused + ".*; export without --onnx: text.stablehlo"):
            onnx_files(run, {})
    else:
        with caplog.at_level(logging.WARNING):
            assert onnx_files(run, {}).keys() == {"text"}
        assert "unknown_operation" in caplog.text and "left out, image.stablehlo" in caplog.text


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"--onnx needs jax2onnx and onnxruntime .*: pip install -e '\.\[onnx\]'$"):
        export_run(toy(), tmp_path / "run", str(tmp_path / "new"), onnx=True)


def scanned(x, kernel, reverse):
    def step(state, at):
        row, number = at
        return jnp.tanh(state @ kernel + row) * number, (state, row + number)

    return lax.scan(step, x[0], (x, jnp.arange(1.0, 4.0)), reverse=reverse)


REWRITTEN = {
    "scan": (lambda x, kernel: scanned(x, kernel, False), {"scan"}),
    "reverse scan": (lambda x, kernel: scanned(x, kernel, True), {"scan"}),
    "scan without inputs": (lambda x, kernel: scanned(kernel[:3], kernel, True), {"scan", "dot_general", "tanh"}),
    "pad": (lambda x, kernel: lax.pad(x, 7.0, ((1, 2, 0), (0, 3, 0))), {"pad"}),
    "booleans": (lambda x, kernel: lax.select_n(x > 0.5, x < 0.2, x > 0.7), {"select_n"}),
    "platform": (
        lambda x, kernel: lax.platform_dependent(x, cpu=lambda x: jnp.sin(jnp.sin(x) - 1), default=jnp.cos),
        {"platform_index", "cond", "sin"},
    ),
    "custom": (
        lambda x, kernel: jax.nn.relu(jax.checkpoint(jnp.sin)(x - 0.5)),
        {"custom_jvp_call", "checkpoint", "jit"},
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_operations_are_written_in_others(name):
    """The result is the same, and the operations that jax2onnx does not have are gone."""
    function, gone = REWRITTEN[name]
    x, kernel = jax.random.uniform(jax.random.key(0), (3, 4)), jax.random.normal(jax.random.key(1), (4, 4))
    traced = jax.make_jaxpr(lambda x: function(x, kernel))(x)
    simple = jax.make_jaxpr(functools.partial(export_onnx._run, traced.jaxpr, traced.consts))(x)
    found = jax.core.eval_jaxpr(simple.jaxpr, simple.consts, x)
    expected = [jnp.cos(x)] if name == "platform" else jax.tree.leaves(function(x, kernel))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert {equation.primitive.name for equation in traced.eqns} & gone
    assert not {equation.primitive.name for equation in simple.eqns} & gone
