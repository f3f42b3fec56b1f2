"""The SentencePiece model that an import learns from captions."""

from collections import Counter

import pytest
import sentencepiece

from data_prep import scenes, vocabulary
from data_prep.schema import DataError


def learn(tmp_path, captions):
    vocabulary.train(captions, tmp_path / "model")
    return sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model"))


@pytest.fixture(scope="module")
def captions():
    return [caption for number in range(200) for caption in scenes.scene(0, number)["captions"]]


def test_frequent_words_are_one_piece(tmp_path, captions):
    model = learn(tmp_path, captions)
    counts = Counter(word for caption in captions for word in caption.replace(",", "").replace(".", "").split())
    frequent = [word for word, count in counts.items() if count >= 50 and len(word) > 2]
    assert len(frequent) > 30
    in_parts = [word for word in frequent if len(model.encode(word)) > 1]
    assert len(in_parts) <= len(frequent) / 20, in_parts  # "see" and "n" may do for "seen"


def test_neither_order_nor_division_of_the_captions_matters(tmp_path, captions):
    forth = learn(tmp_path, captions).serialized_model_proto()
    assert learn(tmp_path, iter(captions[::-1])).serialized_model_proto() == forth
    assert learn(tmp_path, [" ".join(captions)]).serialized_model_proto() == forth


def test_how_often_a_word_occurs_counts(tmp_path):
    order = [learn(tmp_path, ["dog"] * n + ["cat"] * (60 - n)).encode("cat dog", out_type=int) for n in (50, 10)]
    (cat, dog), (cat_more, dog_less) = order
    assert dog < cat, "pieces are in order of their probability"
    assert cat_more < dog_less


def test_rare_words_make_room_for_new_ones(tmp_path, captions, monkeypatch):
    rare = [f"word{number}" for number in range(5_000)]
    monkeypatch.setattr(vocabulary, "_MAX_WORDS", 400)
    counts = vocabulary._count(captions + rare + captions)
    assert len(counts) <= 400
    assert counts["striped"] == 2 * vocabulary._count(captions)["striped"]
    assert len(learn(tmp_path, captions + rare + captions).encode("striped")) == 1


def told(counts):
    """How often the lines say that each word occurs."""
    told: Counter[str] = Counter()
    for line in vocabulary._weighted(counts):
        text, weight = line.split("\t")
        for word in text.split():
            told[word] += int(weight)
    return told


def test_the_trainer_is_told_the_counts():
    counts = Counter({"one": 1, "two": 2, "three": 3, "many": 100})
    assert told(counts) == counts


def test_it_is_told_of_no_more_than_fit_into_memory(monkeypatch):
    monkeypatch.setattr(vocabulary, "_MAX_COUNTED", 1_000)
    counts = Counter({"one": 1, "hundred": 100, "thousands": 9_899})
    assert told(counts) == {"one": 1, "hundred": 10, "thousands": 990}


def test_words_as_long_as_captions(tmp_path):
    assert learn(tmp_path, ["x" * 10_000]).encode("x") != [1]
    assert learn(tmp_path, ["一只狗在草地上奔跑", "一只狗在骑马", "一个男人在骑马"]).encode("狗在") != [1]


def test_captions_that_nobody_sees(tmp_path):
    with pytest.raises(DataError, match="expected visible characters"):
        learn(tmp_path, ["\u200b", "\ufeff"])
