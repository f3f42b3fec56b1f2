"""Overlapping stages and pipelined text towers evaluate to what one after another gives."""

import functools

import jax
import numpy as np
import pytest

from shnet_jax.data.gallery import Part, open_gallery
from shnet_jax.evaluation import evaluator
from shnet_jax.evaluation.encode import Encoder, pieces
from shnet_jax.evaluation.evaluator import Evaluator
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.models.text import TextEncoder, build_tower
from shnet_jax.parallel.mapping import data_mesh
from tests.train import tiny, toy
from tests.train.toy import image_fields  # noqa: F401  # this file is the model of config.model.name = __name__


class Layered(toy.Toy):
    """The toy's image tower beside a text tower of layers."""

    def encode_text(self, batch, *, train):
        return self.text(batch["tokens"], batch["token_mask"], train=train)


def build(config):
    text = TextEncoder(tower=build_tower(config), dim=config.model.dim)
    return Layered(toy.Image(config.model.dim, config.model.dropout), text)


@functools.cache
def variables(name):
    return init_variables(experiment(**LAYERED if name == __name__ else {}), 0)


LAYERED = {"model__name": __name__, "text__tower": "transformer", "text__layers": 2, "text__heads": 2}


def experiment(**changes):
    changes = {"model__name": "tests.train.toy", "eval__batch_size": 3, "eval__tile": 4} | changes
    return assemble(tiny.config(**changes))


def encoded(parts, devices, name="val"):
    gallery = open_gallery(parts.config, parts.dataset, name, parts.tokenizer, parts.fields)
    return Encoder(parts, data_mesh(jax.devices()[:devices])).encode(gallery, variables(parts.config.model.name))


@pytest.mark.parametrize(
    ("devices", "mapping"), [pytest.param(1, "shard_map", marks=pytest.mark.slow), (3, "pmap"), (8, "shard_map")]
)
def test_overlapping_changes_no_bit(devices, mapping):
    changes = {"parallel__mapping": mapping, "data__token_buckets": (16, 32)}
    wanted = encoded(experiment(**changes), devices)
    found = encoded(experiment(**changes, eval__overlap=True), devices)
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(one.vector, other.vector)


@pytest.mark.parametrize("devices", [1, 8])
def test_overlapping_gives_the_same_metrics(devices):
    mesh = data_mesh(jax.devices()[:devices])
    results = []
    for changes in ({}, {"eval__overlap": True, "eval__score_dtype": "bfloat16"}):
        parts = experiment(**changes)
        results.append(Evaluator(parts, "test", mesh).run(variables(parts.config.model.name), 0))
    assert results[0].metrics == results[1].metrics
    assert results[0].card == results[1].card


@pytest.mark.parametrize("field", ["image_batches", "text_batches"])
def test_what_fails_while_reading_is_raised_as_it_is(monkeypatch, field):
    parts = experiment(eval__overlap=True)
    gallery = open_gallery(parts.config, parts.dataset, "val", parts.tokenizer, parts.fields)
    read = getattr(type(gallery), field)

    def broken(self, rows):
        yield next(read(self, rows))
        raise OSError("disk on fire")

    monkeypatch.setattr(type(gallery), field, broken)
    with pytest.raises(OSError, match="disk on fire"):
        Encoder(parts, data_mesh(jax.devices()[:2])).encode(gallery, variables(parts.config.model.name))


@functools.cache
def unstaged(**changes):
    return encoded(experiment(**changes), 4)


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "overlap"), [("shard_map", False), ("pmap", True)])
def test_a_text_tower_in_stages_gives_the_same_up_to_rounding(mapping, overlap, caplog):
    caplog.set_level("INFO", logger="shnet_jax")
    changes = LAYERED | {"eval__batch_size": 2}
    images, texts = unstaged(**changes)
    stages = {"eval__stages": 2, "eval__microbatches": 2, "eval__overlap": overlap, "parallel__mapping": mapping}
    staged = encoded(experiment(**changes | stages), 4)
    np.testing.assert_array_equal(staged[0].vector, images.vector)
    np.testing.assert_allclose(staged[1].vector, texts.vector, atol=2e-6)
    idle = "text tower in 2 stages, microbatches: 2; a stage is idle for 33.3 % of the ticks"
    assert caplog.messages.count(idle) == 1  # and nothing of it without stages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__score_dtype": "half"}, r"config\.eval\.score_dtype is 'half'"),
        ({"eval__batch_size": 0}, r"config\.eval\.batch_size is 0"),
        ({"eval__stages": 3}, r"config\.eval\.stages is 3, which does not divide the 4 devices"),
        ({"eval__stages": 2}, "the text tower Words, which has no layers"),
        (
            {"eval__stages": 2, "eval__microbatches": 7, "model__name": "shnet", "text__tower": "transformer"},
            r"config\.eval\.microbatches is 7, which does not divide the 6 captions of a pipeline",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_read(changes, message, monkeypatch):
    monkeypatch.setattr(evaluator, "open_gallery", lambda *args: pytest.fail("read the gallery"))
    with pytest.raises(ValueError, match=message):
        Evaluator(experiment(**changes), "val", data_mesh(jax.devices()[:4]))


def test_stages_that_do_not_divide_the_devices_are_named():
    parts = experiment(eval__stages=3)
    with pytest.raises(ValueError, match=r"config\.eval\.stages is 3"):
        Encoder(parts, data_mesh(jax.devices()[:4]))


def test_pieces_hold_every_real_row_once_and_no_padding_alone():
    parts = [
        Part({"x": np.arange(6), "y": np.arange(12).reshape(6, 2)}, 6, np.arange(10, 16)),
        Part({"x": np.array([6, 7, 8, 6, 6, 6]), "y": np.zeros((6, 2))}, 3, np.array([2, 1, 0])),
    ]
    found = list(pieces(parts, 4))
    assert [p.valid for p in found] == [4, 2, 3]
    assert [p.batch["x"].tolist() for p in found] == [[0, 1, 2, 3], [4, 5, 5, 5], [6, 7, 8, 6]]
    assert [p.numbers.tolist() for p in found] == [[10, 11, 12, 13], [14, 15], [2, 1, 0]]
    assert all(p.batch["y"].shape == (4, 2) for p in found)
