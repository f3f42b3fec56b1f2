"""The SentencePiece model that an import learns from captions."""

from collections import Counter

import numpy as np
import pytest
import sentencepiece

from data_prep import scenes, vocabulary
from data_prep.schema import DataError

UNKNOWN = 1


def learn(tmp_path, captions):
    vocabulary.train(captions, tmp_path / "model")
    return sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model"))


@pytest.fixture(scope="module")
def captions():
    return [caption for number in range(80) for caption, _ in scenes.tell(0, number)]


def test_frequent_words_are_one_piece(tmp_path, captions):
    model = learn(tmp_path, captions)
    counts = Counter(word for caption in captions for word in caption.replace(",", "").replace(".", "").split())
    frequent = [word for word, count in counts.items() if count >= 20]
    assert len(frequent) > 30
    in_parts = [word for word in frequent if len(model.encode(word)) > 1]
    assert len(in_parts) <= len(frequent) / 20, in_parts  # "see" and "n" may do for "seen"


def test_neither_order_nor_division_of_the_captions_matters(tmp_path, captions):
    forth = learn(tmp_path, captions).serialized_model_proto()
    assert learn(tmp_path, iter(captions[::-1])).serialized_model_proto() == forth
    assert learn(tmp_path, [" ".join(captions)]).serialized_model_proto() == forth


def test_lines_are_in_the_order_of_words():
    counts = {"two": 2, "three": 3, "one": 1}
    forth, back = (
        list(vocabulary._weighted(Counter(dict(items)))) for items in (counts.items(), [*counts.items()][::-1])
    )
    assert forth == back == ["one\t1", "three three\t1", "three\t1", "two two\t1"]


def test_how_often_a_word_occurs_counts(tmp_path):
    order = [learn(tmp_path, ["dog"] * n + ["cat"] * (60 - n)).encode("cat dog", out_type=int) for n in (50, 10)]
    (cat, dog), (cat_more, dog_less) = order
    assert dog < cat, "pieces are in order of their probability"
    assert cat_more < dog_less


def test_case_is_folded(tmp_path, captions):
    model = learn(tmp_path, captions)
    assert model.encode("A Striped SQUARE") == model.encode("a striped square")


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


def test_the_share_that_it_is_told_is_that_of_rare_and_frequent_words(monkeypatch):
    monkeypatch.setattr(vocabulary, "_MAX_COUNTED", 30_000)
    rare, frequent = {f"rare{n}": 3 for n in range(10_000)}, {f"frequent{n}": 270 for n in range(1_000)}
    counts = told(Counter(rare | frequent))
    assert counts.total() == pytest.approx(30_000, rel=0.01)
    assert sum(counts[word] for word in rare) == pytest.approx(3_000, rel=0.1)
    assert {counts[word] for word in frequent} == {27}


def test_many_different_words_leave_frequent_ones_whole(tmp_path, monkeypatch):
    """Zipf's law with 3,000 words; the trainer is told of a tenth."""
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (3_000, 9))
    words = ["".join(row[: 3 + number % 7]) for number, row in enumerate(letters)]
    counts = Counter({word: 200_000 // (rank + 1) for rank, word in enumerate(words)})
    monkeypatch.setattr(vocabulary, "_MAX_COUNTED", counts.total() // 10)
    monkeypatch.setattr(vocabulary, "_count", lambda captions: counts)
    model = learn(tmp_path, [])
    assert sum(len(model.encode(word)) > 1 for word in words[:1_000]) <= 20


def test_rare_words_make_room_for_new_ones(tmp_path, captions, monkeypatch):
    rare = [f"word{number}" for number in range(5_000)]
    monkeypatch.setattr(vocabulary, "_MAX_WORDS", 400)
    counts = vocabulary._count(captions + rare + captions)
    assert len(counts) <= 400
    assert counts["striped"] == 2 * vocabulary._count(captions)["striped"]
    assert len(learn(tmp_path, captions + rare + captions).encode("striped")) == 1


def test_words_that_make_room_are_of_any_part_of_the_captions(monkeypatch):
    monkeypatch.setattr(vocabulary, "_MAX_WORDS", 1_000)
    kept = vocabulary._count(f"{part}{number}" for part in "abc" for number in range(5_000))
    shares = Counter(word[0] for word in kept)
    assert min(shares[part] for part in "abc") > 100


def test_words_as_long_as_captions(tmp_path):
    assert UNKNOWN not in learn(tmp_path, ["x" * 10_000]).encode("x")
    assert UNKNOWN not in learn(tmp_path, ["一只狗在草地上奔跑", "一只狗在骑马", "一个男人在骑马"]).encode("狗在")
    assert UNKNOWN not in learn(tmp_path, ["a" * 300 + "b" * 300 + "c" * 300]).encode("abc")


def test_captions_of_which_nothing_can_be_learned(tmp_path):
    for captions in (["\u200b", "\ufeff"], ["\u2581"], []):
        with pytest.raises(DataError, match="visible characters"):
            learn(tmp_path, captions)
        assert not (tmp_path / "model").exists()
