"""Each model through every mode, as a user would take it: what fits one model alone is found here.

The sets are tiny, the towers a few units wide; numbers are looked at elsewhere.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import shnet_jax
from configs import align as align_config
from configs import cmsei as cmsei_config
from configs import esa as esa_config
from configs import scenes, user_study
from data_prep import encode_captions, people
from data_prep.builder import write_dataset
from shnet_jax.interop.sentence_vectors import SentenceEncoder, describe
from shnet_jax.modes import plan as plan_mode
from shnet_jax.modes.convert import convert
from shnet_jax.modes.cross import cross
from shnet_jax.modes.embed import embed
from shnet_jax.modes.evaluate import evaluate
from shnet_jax.modes.page import page
from shnet_jax.modes.search import search
from shnet_jax.modes.train import train
from shnet_jax.plan import programs
from tests.interop.test_sentence_vectors import bert
from tests.train import tiny

pytestmark = pytest.mark.slow

SMALL = {
    "data.resident": False, "data.read_threads": 1, "data.prefetch": 2, "data.captions_per_image": 1,
    "data.max_tokens": 16, "data.token_buckets": (16,), "model.dim": 8, "model.map_channels": 2,
    "model.dtype": "float32", "text.width": 8, "text.dtype": "float32",
    "train.batch_size": 8, "train.steps": 2, "train.log_steps": 1, "train.eval_epochs": 0.0, "parallel.devices": 1,
    "eval.batch_size": 8, "eval.tile": 4, "eval.hubness": True, "plan.search": False,
    "plan.effort": -1.0, "page.queries": 1, "page.failures": 1, "page.highlights": 1, "page.results": 2,
}  # fmt: skip


@functools.cache
def figures() -> Path:
    """Figures of which two images each are of a person, as the pictures that they are, too."""
    starts = {"train": 0, "val": 800, "test": 1600}
    splits = {split: list(people.records(3, start, start + 8)) for split, start in starts.items()}
    return write_dataset(tiny.folder(), "figures_of_modes", splits, {"source": "made by the tests"})


def small(c: ConfigDict, data: Path, **changes) -> ConfigDict:
    flat = SMALL | {"data.dir": str(data)} | {name.replace("__", "."): value for name, value in changes.items()}
    c.update_from_flattened_dict(flat)
    c.unlock()
    return c


@functools.cache
def vectors() -> Path:
    """Scenes with the mean of their regions, and their captions as a tiny BERT sees them."""
    tiny.write("means", lambda record: record | {"image_embedding": record["regions"].astype(np.float32).mean(0)})
    described = describe(str(bert(tiny.folder() / "bert")))
    encode, options = SentenceEncoder(described).encode, {"dtype": "float16", "overwrite": False}
    return encode_captions.encode_captions(
        tiny.folder() / "means", "encoded", tiny.folder(), described, encode, **options
    )


def shnet() -> ConfigDict:
    return small(scenes.get_config(), tiny.dataset())


def user() -> ConfigDict:
    c = user_study.get_config("scenes")
    changes = {"momentum__queue": 16, "momentum__from_epoch": 0.0, "loss__weights__uto": 1.0}
    return small(c, tiny.dataset(), model__name="user", **changes)


def cmsei() -> ConfigDict:
    return small(cmsei_config.get_config("scenes"), tiny.dataset(), model__cmsei__geometry_heads=2)


def esa() -> ConfigDict:
    fixed = {"model__esa__size": 2, "model__esa__text_size": 3, "model__esa__depth": 1, "model__esa__heads": 2}
    fixed |= {"loss__weights__asm": 0.0, "loss__weights__diversity": 0.0}
    return small(esa_config.get_config(), figures(), **fixed)


def only_traced(*args):
    """The step is not compiled a second time."""
    programs.lower_train(*args)
    return jax.jit(lambda x: x).lower(1.0)


def align() -> ConfigDict:
    c = small(align_config.get_config("small"), vectors(), data__resident=True)
    c.model.dtype = c.text.dtype = "float32"
    return c


@pytest.mark.parametrize("model", [shnet, user, cmsei, esa, align])
def test_every_mode(model, tmp_path, monkeypatch):
    config, first, second = model(), tmp_path / "first", tmp_path / "converted"
    with tiny.quick():
        train(config, first)

        # All that there is as candidates: the ranks of the exact search, whatever the score looks at.
        config.eval.two_stage = 1000
        evaluate(config, first)
        (results,) = first.glob("results_*.json")
        arms = json.loads(results.read_text("utf-8"))["arms"]
        assert list(arms) == [f"{config.name}, {way}" for way in ("global vectors", "two-stage 1000", "exact")]
        _, staged, exact = arms.values()
        assert staged["metrics"] == pytest.approx(exact["metrics"])
        assert ("person_map" in staged["metrics"]) == (model is esa)
        config.eval.two_stage = 0

        embed(config, first)
        search(config, first, "a red thing", top_k=2)
        answers = json.loads((first / "search.json").read_text("utf-8"))["results"]
        page(config, first)
        (shown,) = first.glob("page_*.html")
        text = shown.read_text("utf-8")
        assert f"{exact['metrics']['rsum']:.1f}" in text and "How it learned" in text
        if model is esa:  # it has persons, pixels and weights of its pooling, and neither gates nor attention
            for wanted in (
                "text to person, mAP",
                "the images of its person",
                "data:image/jpeg",
                "How the set is pooled",
            ):
                assert wanted in text, wanted
            assert "Semantic gate" not in text and "There are no photographs" not in text
        retriever = shnet_jax.load(first)
        (folder,) = (first / "embeddings").iterdir()
        retriever.open(folder)
        assert [hit.image_id for hit in retriever.search("a red thing", top_k=2)[0].hits] == [
            hit["image_id"] for hit in answers[0]["hits"]
        ]

        monkeypatch.setattr(plan_mode, "lower_train", only_traced)
        config.eval.two_stage = 3
        plan_mode.plan(config, tmp_path / "plan", "cpu:1")
        planned = json.loads((tmp_path / "plan/plan_cpu_1.json").read_text("utf-8"))["rankings"]
        assert list(planned) == ["global vectors", "two-stage 3", "exact"]
        blocks = model is cmsei  # whose score is scored pair by pair
        assert planned["exact"]["columns"] == (4 if blocks else 16 if model is esa else 32)
        config.eval.two_stage = 0

        config.convert.to = str(tmp_path / "weights")
        convert(config, first)
        config.convert.to, config.convert.source = "", str(tmp_path / "weights")
        convert(config, second)
        config.convert.source = ""

        # With its own converted self: what it says alone.
        config.eval.ensemble = (str(first), str(second))
        evaluate(config, tmp_path / "both")
        (both,) = (tmp_path / "both").glob("results_*.json")
        arms = json.loads(both.read_text("utf-8"))["arms"]
        assert [arm["metrics"] for arm in arms.values()] == [exact["metrics"]] * 3
        config.eval.ensemble = ()

        config.cross.runs, config.cross.data_dirs = (str(first),), (config.data.dir,)
        ((results,),) = (row.values() for row in cross(config, tmp_path / "cross").values())
        assert results.metrics == exact["metrics"]


def test_sets_fill_queues(tmp_path):
    """Each slot holds what the key encoders gave, global vector and set; the CMSEI-style interaction has no queues."""
    config = esa()
    config.momentum.queue = 2 * config.train.batch_size + 1
    train(config, tmp_path)
    saved = tiny.arrays(tmp_path, config.train.steps)
    for side, size in (("images", config.model.esa.size), ("texts", config.model.esa.text_size)):
        queue = {part: saved[f"momentum['{side}']['{part}']"] for part in ("vectors", "elements", "ids")}
        assert queue["elements"].shape == (config.momentum.queue, size, config.model.dim)
        np.testing.assert_allclose(np.linalg.norm(queue["elements"], axis=-1), 1, atol=1e-3)
        assert (queue["ids"] >= 0).any()
    other = cmsei()
    other.momentum.queue = 16
    with pytest.raises(ValueError, match="which is what queues hold"):
        train(other, tmp_path / "cmsei")
