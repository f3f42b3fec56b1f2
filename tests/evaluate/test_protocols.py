import dataclasses
import json

import numpy as np
import pytest

from shnet_jax.evaluation.metrics import recalls
from shnet_jax.evaluation.protocols import Provenance, count_folds, evaluate
from shnet_jax.evaluation.ranks import ranks
from shnet_jax.evaluation.report import PERSON, card_table, table, to_json
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Embedding

SCORE = RetrievalModel.score


def gallery(n=20, captions=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((n, 16)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(n), captions))
    texts = images[owner] + rng.standard_normal((n * captions, 16)).astype(np.float32)
    return Embedding(images), Embedding(texts), owner


def test_a_row_without_persons_leaves_their_columns_empty():
    plain = evaluate(*gallery(), SCORE, "whole")
    persons, guess = dict.fromkeys(PERSON, 50.0), dict.fromkeys(PERSON, 9.0)
    results = dataclasses.replace(plain, metrics=plain.metrics | persons, chance=plain.chance | guess)
    lines = str(table({"sets": results, "zero-shot": plain})).splitlines()
    assert len(lines) == 5 and lines[4].split("|")[-2].strip() == "9.0"  # one gallery, one row of guessing
    assert str(table({"zero-shot": plain, "sets": results})).splitlines()[4] == lines[4]
    assert lines[2].split("|")[-2].strip() == "50.0" and lines[3].split("|")[-2].strip() == ""


def test_folds_rank_each_block_alone_and_average():
    images, texts, owner = gallery()
    found = evaluate(images, texts, owner, SCORE, "folds5", tile=3)
    blocks = []
    for k in range(5):
        own = np.flatnonzero(owner // 4 == k)
        block = Embedding(images.vector[4 * k : 4 * k + 4]), Embedding(texts.vector[own]), owner[own] - 4 * k
        blocks.append(recalls(ranks(*block, SCORE)))
    assert list(found.folds) == blocks
    for name in found.metrics:
        assert found.metrics[name] == pytest.approx(np.mean([b[name] for b in blocks]))
    assert found.chance["t2i_r1"] == pytest.approx(25.0)


def test_whole_is_one_fold():
    images, texts, owner = gallery()
    found = evaluate(images, texts, owner, SCORE)
    assert found.metrics == recalls(ranks(images, texts, owner, SCORE)) == found.folds[0]
    assert found.chance["t2i_r1"] == pytest.approx(5.0)


def test_images_that_do_not_divide_into_folds_are_an_error():
    with pytest.raises(ValueError, match="20 images do not divide into 3 folds"):
        evaluate(*gallery(), SCORE, "folds3")


@pytest.mark.parametrize("name", ["", "fold5", "folds", "folds0", "folds-1", "folds5x"])
def test_unknown_protocols_are_an_error(name):
    with pytest.raises(ValueError, match="unknown protocol"):
        count_folds(name)


def test_the_card_says_what_was_computed_on_what():
    subject = Provenance("synthetic", "test", 1200, "trained", "bfloat16", "val", 4)
    card = evaluate(*gallery(), SCORE, "folds5", subject).card
    expected = {
        "protocol": "folds5",
        "dataset": "synthetic",
        "split": "test",
        "checkpoint_step": 1200,
        "dtype": "bfloat16",
    }
    expected |= {"images": 20, "captions": 60, "folds": 5, "selected_on": "val", "parameters": "trained", "devices": 4}
    assert {name: card[name] for name in expected} == expected
    assert {"ties", "device", "jax", "flax", "median_rank", "gallery"} <= set(card)
    assert "5 consecutive galleries of 4 images" in card["gallery"]
    assert str(card_table(card)).count("\n") == len(card) + 2


def test_json_keeps_every_number():
    found = evaluate(*gallery(), SCORE, "folds5")
    read = json.loads(to_json({"ours": found}))
    assert read["format"] == 1
    assert list(read["arms"]["ours"]) == ["metrics", "folds", "chance", "card", "extra", "intervals"]
    assert read["arms"]["ours"]["metrics"] == found.metrics
    assert read["arms"]["ours"]["folds"] == list(found.folds)


def test_the_table_is_aligned_and_has_one_chance_row_for_each_gallery():
    first, second = evaluate(*gallery(), SCORE), evaluate(*gallery(seed=1), SCORE)
    folds = evaluate(*gallery(), SCORE, "folds5")
    lines = str(table({"a": first, "a longer name": second, "folds": folds})).splitlines()
    assert len({len(line) for line in lines}) == 1
    starts = [line.split("|")[1].strip() for line in lines[2:]]
    guesses = ["chance (20 images, 60 captions)", "chance (20 images, 60 captions, 5 folds)"]
    assert starts == ["a", "a longer name", "folds", *guesses]
    assert lines[2].split("|")[-2].strip() == f"{first.metrics['rsum']:.1f}"
    assert lines[5].split("|")[2].strip() == "5.0"
