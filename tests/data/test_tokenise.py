from itertools import chain

import numpy as np
import pytest

from configs import base
from shnet_jax.data import tokenise
from shnet_jax.data.records import SENTENCEPIECE

VOCABULARY = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY += ["a", "dog", "jump", "##s", "##ing", "cafe", ",", "[", "]", "mask"]


def flatten(lists):
    return list(chain.from_iterable(lists))


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def test_wordpiece_is_bert_uncased_with_pieces_grouped_by_word(vocab):
    t = tokenise.wordpiece(vocab)
    name = {piece: i for i, piece in enumerate(VOCABULARY)}
    words = t.words("A dog, JUMPS (café) jumping")
    spelled = [["a"], ["dog"], [","], ["jump", "##s"], ["[UNK]"], ["cafe"], ["[UNK]"], ["jump", "##ing"]]
    assert words == [[name[p] for p in word] for word in spelled]
    assert t.encode(words[:2], 32) == [name["[CLS]"], name["a"], name["dog"], name["[SEP]"]]
    assert t.words("") == []
    assert t.encode([], 32) == [name["[CLS]"], name["[SEP]"]]


def test_special_tokens_in_a_caption_are_text(vocab):
    t = tokenise.wordpiece(vocab)
    assert t.mask_id not in flatten(t.words("[MASK]"))
    assert t.words("[MASK]") == [[VOCABULARY.index("[")], [VOCABULARY.index("mask")], [VOCABULARY.index("]")]]


def test_encode_cuts_pieces_but_not_the_end(vocab):
    t = tokenise.wordpiece(vocab)
    ids = t.encode(t.words("jumps " * 20), 6)
    assert len(ids) == 6
    assert (ids[0], ids[-1]) == (t.begin_id, t.end_id)


def test_random_tokens_are_never_special(vocab):
    t = tokenise.wordpiece(vocab)
    assert t.random_range == (6, len(VOCABULARY)) and t.vocab_size == len(VOCABULARY)


@pytest.fixture
def pieces_of_tiny(tiny):
    return tokenise.sentence_piece(tiny.path / SENTENCEPIECE)


def test_sentencepiece_of_the_data_set(pieces_of_tiny):
    t = pieces_of_tiny
    text = "The dog and the HORSE jumps"
    words = t.words(text)
    assert len(words) == len(text.split())
    assert words == t.words(text.lower())
    assert t.mask_id not in flatten(t.words("[MASK]"))
    assert (t.mask_id, t.begin_id, t.end_id, t.random_range) == (4, 2, 3, (5, t.vocab_size))


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece"])
def test_flat_captions_equal_one_by_one(kind, vocab, pieces_of_tiny, monkeypatch):
    monkeypatch.setattr(tokenise, "_CHUNK", 3)  # captions cross chunk borders
    t = tokenise.wordpiece(vocab) if kind == "wordpiece" else pieces_of_tiny
    # "##s" is a continuation as text too: a caption must not join the one before it.
    texts = [
        ["a dog jumps"],
        ["jumping, a dog", "ings", "dog", "\u200b"],
        ["zebra a"],
        ["a", "jumps a dogs jumps"],
    ]
    flat = tokenise.tokenise_captions(iter(texts), t)
    assert flat.image.tolist() == [0, 1, 1, 1, 1, 2, 3, 3]
    assert flat.pieces.dtype == flat.image.dtype == np.int32
    for number, text in enumerate(flatten(texts)):
        pieces, word_lengths = flat.caption(number)
        words = t.words(text)
        assert pieces.tolist() == flatten(words)
        assert word_lengths.tolist() == [len(word) for word in words]
        assert flat.lengths()[number] == len(pieces)


def test_captions_that_begin_with_a_continuation_stay_apart():
    class Fixed:
        def pieces(self, texts):
            return [[1, 2], [], [2, 2, 1], [1]]

    starts = np.array([False, True, False])
    t = tokenise.Tokenizer(Fixed(), starts, mask_id=0, begin_id=0, end_id=0, random_range=(1, 3))
    flat = tokenise.tokenise_captions([["", "", "", ""]], t)
    assert [flat.caption(i)[1].tolist() for i in range(4)] == [[2], [], [2, 1], [1]]
    assert [flat.caption(i)[0].tolist() for i in range(4)] == [[1, 2], [], [2, 2, 1], [1]]


def test_where_the_file_comes_from(vocab, tiny_folder):
    c = base.get_config()
    with pytest.raises(ValueError, match=r"text\.weights"):
        tokenise.load_tokenizer(c)
    c.text.weights = str(vocab.parent)
    assert tokenise.load_tokenizer(c).vocab_size == len(VOCABULARY)
    c.text.weights = str(vocab.parent / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere/vocab\.txt"):
        tokenise.load_tokenizer(c)
    c.tokenizer.path = str(vocab)
    assert tokenise.load_tokenizer(c).vocab_size == len(VOCABULARY)
    c.tokenizer.kind, c.tokenizer.path, c.data.dir = "sentencepiece", "", str(tiny_folder.parent)
    assert tokenise.load_tokenizer(c).vocab_size > 5
    c.tokenizer.kind = "bpe"
    with pytest.raises(ValueError, match=r"'bpe'; known: wordpiece, sentencepiece"):
        tokenise.load_tokenizer(c)


def test_a_vocabulary_without_special_tokens_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\ndog\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.txt: 5 pieces but no \[MASK\]"):
        tokenise.wordpiece(path)
    path.write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"piece 0 is '\[UNK\]'"):
        tokenise.wordpiece(path)
