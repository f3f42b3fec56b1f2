"""Folders of `shnet export`: programs equal to the run's own, everything read back bit by bit, cards that say it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import export
from ml_collections import ConfigDict

import shnet_jax
from configs import align, base, cmsei, dual, esa, scenes, user_study
from shnet_jax.evaluation.encode import image_tower, text_tower
from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.modes.convert import load_folder, load_run
from shnet_jax.modes.evaluate import evaluate
from shnet_jax.modes.export import PRIVATE, SUMS, _public, export_run
from shnet_jax.modes.export_programs import PLATFORMS, flatten, programs, to_stablehlo
from shnet_jax.modes.train import train
from shnet_jax.plan import planned_run
from shnet_jax.training.warm_start import warm_start
from shnet_jax.training.workdir import WorkdirError
from shnet_jax.types import Embedding
from tests.train import tiny

pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers: pip install -e '.[export]'")

SIZES = (1, 9)  # of batches: below and above the units of a set and the blocks of the CMSEI-style score
SMALL = {
    "data.dir": "", "data.resident": False, "data.captions_per_image": 1,
    "data.max_tokens": 6, "data.token_buckets": (6,), "model.dim": 8, "model.dtype": "float32",
    "model.map_channels": 2, "model.num_classes": 5, "text.dtype": "float32", "text.width": 8, "text.heads": 2,
    "text.layers": 1, "text.mlp_dim": 8, "text.vocab_size": 12, "text.max_positions": 8, "plan.regions": 4,
    "plan.region_dim": 6, "plan.grid": 3, "plan.grid_dim": 6, "plan.image_embedding": 8, "plan.caption_embedding": 8,
}  # fmt: skip
MODELS = {
    "shnet": (scenes.get_config, {}),
    "shnet of BERT in bfloat16": (base.get_config, {"model.dtype": "bfloat16", "text.dtype": "bfloat16"}),
    "user": (functools.partial(user_study.get_config, "scenes"), {"model.name": "user"}),
    "cmsei": (functools.partial(cmsei.get_config, "scenes"), {"model.cmsei.geometry_heads": 2, "model.cmsei.block": 9}),
    "esa": (
        esa.get_config,
        {"model.esa.size": 2, "model.esa.text_size": 3, "model.esa.depth": 1, "model.esa.heads": 2},
    ),
    "align": (functools.partial(align.get_config, "small"), {}),
    "dual": (functools.partial(dual.get_config, "head"), {"text.projection": 8, "text.frozen_layers": 0}),
}


def planned(name: str) -> planned_run.PlannedRun:
    get_config, changes = MODELS[name]
    config = get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return planned_run.describe(config)


def random_weights(run: planned_run.PlannedRun) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = flatten(planned_run.variable_shapes(run))
    return {
        name: (rng.uniform(0.5, 1.5, like.shape) if name.endswith("var") else rng.normal(0, 0.3, like.shape)).astype(
            like.dtype
        )
        for name, like in shapes.items()
    }


def inputs(run: planned_run.PlannedRun, like: dict[str, jax.ShapeDtypeStruct], rows: int) -> dict[str, np.ndarray]:
    """Random fields, of which each mask leaves out the last ones of every second row."""
    batch = planned_run.random_batch(run, rows, 1)
    fields = {name: np.asarray(batch[name][:rows], shape.dtype) for name, shape in like.items()}
    for name in fields:
        if name.endswith("_mask"):
            fields[name][::2, -1] = False
    if "tokens" in fields:
        fields["tokens"] = fields["tokens"] * fields["token_mask"]
    return fields


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_programs_equal_the_models_own(name):
    run = planned(name)
    weights = random_weights(run)
    # Operands that differ by a rounding of float32 may round apart in bfloat16.
    atol = 5e-3 if "bfloat16" in name else 1e-5
    made = programs(run, weights)
    read = {}
    for program in made.values():
        blob = to_stablehlo(run, program, weights).serialize()
        read[program.name] = export.deserialize(blob)
        assert read[program.name].platforms == PLATFORMS
    variables = {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(weights, sep="/")
    own = {"image": image_tower, "text": text_tower}
    for rows in SIZES:
        found, expected = {}, {}
        for side, tower in own.items():
            batch = inputs(run, made[side].inputs[0], rows)
            found[side] = read[side].call(weights, batch)
            expected[side] = jax.jit(functools.partial(tower, run.model))(variables, batch)
            assert np.linalg.norm(found[side]["vector"], axis=1) == pytest.approx(1, abs=1e-4)
            for field, array in found[side].items():
                np.testing.assert_allclose(array, getattr(expected[side], field), atol=atol, err_msg=f"{side} {field}")
        scores = read["score"].call(weights, found["image"], found["text"])["scores"]
        assert scores.shape == (rows, rows)
        score = scorer(run.model, variables["params"])
        np.testing.assert_allclose(scores, jax.jit(score)(expected["image"], expected["text"]), atol=atol)
        if rows > 1:  # a constant would be equal too
            assert np.std(scores) > 1e-4


def test_every_model_is_exported():
    """A model whose file has `build` is in the list above."""
    folder = Path(shnet_jax.__file__).parent / "models"
    built = {path.stem for path in folder.glob("*.py") if re.search(r"(?m)^def image_fields", path.read_text("utf-8"))}
    assert built == {name.split()[0] for name in MODELS}


class Closed(RetrievalModel):
    """Text by a sum, images by a rule that needs their number."""

    def encode_image(self, batch, *, train):
        rows = batch["image_embedding"]
        return Embedding(rows if rows.shape[0] > 3 else -rows)

    def encode_text(self, batch, *, train):
        return Embedding(jnp.sum(batch["caption_embeddings"], axis=1, keepdims=True))


def test_a_model_of_fixed_batches_is_refused():
    run = dataclasses.replace(planned("align"), model=Closed())
    with pytest.raises(
        ValueError, match=r"^the model align cannot be exported with an open batch size: image program: "
    ):
        programs(run, {})


def toy(**changes) -> ConfigDict:
    return tiny.config(model__name="tests.train.toy", train__steps=2, name="toy run", **changes)


def test_nothing_that_is_published_names_this_machine():
    """Every field of text that can hold a path or an address, but names of modules and choices."""
    c = base.get_config()
    for field in PRIVATE:
        section, _, name = field.rpartition(".")
        functools.reduce(getattr, section.split("."), c)[name] = "/home/somebody"
    c.data.negatives.count = 2
    public = _public(c)
    assert "somebody" not in public.to_json() and public.data.negatives.count == 0
    texts = {
        "dir",
        "folder",
        "path",
        "address",
        "weights",
        "eccv",
        "cxc",
        "compare",
        "embeddings",
        "pictures",
        "init_from",
    }
    fields = {name.removeprefix("config."): value for name, value in flat(c).items() if isinstance(value, str)}
    assert {name for name in fields if name.rpartition(".")[2] in texts} <= {*PRIVATE}


def flat(section, prefix="config") -> dict:
    """Values by their names, config.SECTION.FIELD."""
    found = {}
    for name, value in section.items():
        found |= flat(value, f"{prefix}.{name}") if isinstance(value, ConfigDict) else {f"{prefix}.{name}": value}
    return found


@functools.cache
def trained() -> Path:
    path = tiny.folder() / "to_export"
    with tiny.quick():
        train(toy(), path)
    return path


@pytest.fixture(scope="module")
def published() -> Path:
    folder = tiny.folder() / "to_publish"
    export_run(toy(), trained(), str(folder))
    return folder


def equal(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_the_folder_is_complete_and_its_sums_hold(published):
    names = {path.name for path in published.iterdir()}
    programs_of = {"image.stablehlo", "text.stablehlo", "score.stablehlo", "programs.json"}
    assert names == {"README.md", "config.json", "model.safetensors", "vocabulary.model", SUMS} | programs_of
    sums = dict(line.split("  ")[::-1] for line in (published / SUMS).read_text("utf-8").splitlines())
    assert sums.keys() == names - {SUMS}
    card = (published / "README.md").read_text("utf-8")
    for name, digest in sums.items():
        assert hashlib.sha256((published / name).read_bytes()).hexdigest() == digest
        assert name == "README.md" or digest in card
    for path in (published / "config.json", published / "README.md", published / "programs.json"):
        assert str(tiny.folder()) not in path.read_text("utf-8"), f"{path.name} has a path of this machine"


@pytest.mark.slow
def test_it_is_read_back_bit_by_bit(published, tmp_path):
    run = load_run(trained())
    equal(load_folder(published, toy()).variables, run.variables)
    without_data = shnet_jax.load(published)
    equal(without_data.loaded.variables, run.variables)
    assert without_data.loaded.step == run.step == 2
    own = shnet_jax.load(trained())
    texts = ["a red star", "two hearts above the sea"]
    np.testing.assert_array_equal(without_data.encode_texts(texts).vector, own.encode_texts(texts).vector)
    with pytest.raises(ValueError, match=r"programs\.json has the shapes of a data set, and no images: give one"):
        without_data.search("a red star")
    searched = shnet_jax.load(published, tiny.dataset()).search("a red star")[0]
    assert [hit.image_id for hit in searched.hits] == [hit.image_id for hit in own.search("a red star")[0].hits]
    start = toy(train__init_from=str(published), tokenizer__path=str(published / "vocabulary.model"))
    zeros = jax.tree.map(jnp.zeros_like, run.variables)
    equal(warm_start(zeros, start), run.variables)


ALONE = """
import json, sys
sys.modules["shnet_jax"] = None  # an import of it fails
import numpy as np
from flax import traverse_util
from jax import export
from safetensors.numpy import load_file
folder, out = sys.argv[1:]
weights = load_file(folder + "/model.safetensors")
text = export.deserialize(open(folder + "/text.stablehlo", "rb").read())
about = json.load(open(folder + "/programs.json"))["tokens"]
tokens = np.zeros((2, text.in_avals[-1].shape[1]), np.int32)
tokens[0, :4], tokens[1, :3] = [about["begin"], 7, 8, about["end"]], [about["begin"], 9, about["end"]]
np.save(out, text.call(weights, {"tokens": tokens, "token_mask": tokens > 0})["vector"])
"""


@pytest.mark.slow
def test_a_program_runs_without_this_package(published, tmp_path):
    command = [sys.executable, "-c", ALONE, str(published), str(tmp_path / "out.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = shnet_jax.load(trained()).loaded
    tokenizer, length = loaded.experiment.tokenizer, 32
    tokens = np.zeros((2, length), np.int32)
    for row, ids in enumerate(([7, 8], [9])):
        tokens[row, : len(ids) + 2] = tokenizer.enclose(ids, length)
    own = text_tower(loaded.experiment.model, loaded.variables, {"tokens": tokens, "token_mask": tokens > 0})
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), own.vector, atol=1e-6)


@pytest.mark.slow
def test_the_card_has_the_results_of_this_checkpoint_or_says_that_there_are_none(published, tmp_path):
    plain = (published / "README.md").read_text("utf-8")
    front = plain.split("---\n")[1]
    assert front.startswith("license: unknown  # TO BE FILLED IN") and "library_name: shnet_jax" in front
    assert "\nnot evaluated: " in plain and plain.count("TO BE FILLED IN") == 6
    evaluate(toy(), trained())
    (path,) = trained().glob("results_*.json")
    document = json.loads(path.read_text("utf-8"))
    try:
        export_run(toy(), trained(), str(tmp_path / "a"), license="apache-2.0")
        card = (tmp_path / "a" / "README.md").read_text("utf-8")
        (arm,) = document["arms"].values()
        assert "not evaluated" not in card and f"{arm['metrics']['rsum']:.1f}" in card
        assert "### tiny, test, whole" in card and "floor(median of 0-based ranks) + 1" in card
        assert 'license: "apache-2.0"' in card and card.count("TO BE FILLED IN") == 4
        arm["card"]["checkpoint_step"] = 1
        path.write_text(json.dumps(document))
        export_run(toy(), trained(), str(tmp_path / "b"))
        assert "\nnot evaluated: " in (tmp_path / "b" / "README.md").read_text("utf-8")
    finally:
        path.unlink()


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--to=FOLDER"):
        export_run(toy(), tmp_path / "run", "")
    with pytest.raises(WorkdirError, match="exists already; choose another --to"):
        export_run(toy(), tmp_path / "run", str(tmp_path))
    with pytest.raises(WorkdirError, match=r"no config\.json"):
        export_run(toy(), tmp_path / "run", str(tmp_path / "new"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_data_set_is_refused(tmp_path):
    config = toy()
    config.data.dir, config.plan.region_dim = "", 3
    with pytest.raises(ValueError, match=r"does not fit the fields of config\.plan: params/image/linear/kernel is"):
        export_run(config, trained(), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 9}, "format 9, expected 1"),
        ({"fields": []}, "expected fields and text_encoder"),
        ({"fields": {"regions": {"shape": [-1, 2], "dtype": "float32"}}}, "field 'regions' is"),
        ({"fields": {"regions": {"shape": [1, 2], "dtype": "object"}}}, "field 'regions' is"),
    ],
)
def test_a_description_that_was_edited(change, match, published, tmp_path):
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    about = json.loads((published / "programs.json").read_text("utf-8"))
    (tmp_path / "programs.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=match):
        shnet_jax.load(tmp_path)
