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


def words_of(text, tokenizer):
    """Pieces of each word of `text`."""
    pieces, word_lengths = tokenise.tokenise_captions([[text]], tokenizer).caption(0)
    return [part.tolist() for part in np.split(pieces, np.cumsum(word_lengths)[:-1])] if len(pieces) else []


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def test_wordpiece_is_bert_uncased_with_pieces_grouped_by_word(vocab):
    t = tokenise.wordpiece(vocab)
    name = {piece: i for i, piece in enumerate(VOCABULARY)}
    words = words_of("A dog, JUMPS (café) jumping", t)
    spelled = [["a"], ["dog"], [","], ["jump", "##s"], ["[UNK]"], ["cafe"], ["[UNK]"], ["jump", "##ing"]]
    assert words == [[name[p] for p in word] for word in spelled]
    assert words_of("", t) == []


def test_special_tokens_in_a_caption_are_text(vocab):
    t = tokenise.wordpiece(vocab)
    assert words_of("[MASK]", t) == [[VOCABULARY.index("[")], [VOCABULARY.index("mask")], [VOCABULARY.index("]")]]


@pytest.mark.parametrize(
    ("pieces", "max_tokens", "ids"),
    [([7, 8], 4, [3, 7, 8, 4]), ([], 4, [3, 4]), ([7, 8, 9, 10], 4, [3, 7, 8, 4]), ([7, 8], 2, [3, 4])],
)
def test_a_caption_is_cut_between_its_ends(vocab, pieces, max_tokens, ids):
    enclosed = tokenise.wordpiece(vocab).enclose(pieces, max_tokens)
    assert enclosed.tolist() == ids and enclosed.dtype == np.int32
    assert (VOCABULARY[3], VOCABULARY[4]) == ("[CLS]", "[SEP]")


def test_random_tokens_are_never_special(vocab):
    t = tokenise.wordpiece(vocab)
    assert t.random_range == (6, len(VOCABULARY)) and t.vocab_size == len(VOCABULARY)


@pytest.fixture
def pieces_of_tiny(tiny):
    return tokenise.sentence_piece(tiny.path / SENTENCEPIECE)


def test_sentencepiece_of_the_data_set(pieces_of_tiny):
    t = pieces_of_tiny
    text = "The dog and the HORSE jumps"
    words = words_of(text, t)
    assert len(words) == len(text.split())
    assert words == words_of(text.lower(), t)
    assert t.mask_id not in flatten(words_of("[MASK]", t))
    assert (t.mask_id, t.begin_id, t.end_id, t.random_range) == (4, 2, 3, (5, t.vocab_size))


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece"])
def test_flat_captions_equal_one_by_one(kind, vocab, pieces_of_tiny, monkeypatch):
    monkeypatch.setattr(tokenise, "_CHUNK", 3)  # captions cross chunk borders
    t = tokenise.wordpiece(vocab) if kind == "wordpiece" else pieces_of_tiny
    # "##s" is a continuation as text too: a caption must not join the one before it.
    texts = [["a dog jumps"], ["jumping, a dog", "ings", "dog", "\u200b"], ["zebra a"], ["a", "jumps a dogs jumps"]]
    flat = tokenise.tokenise_captions(iter(texts), t)
    assert flat.image.tolist() == [0, 1, 1, 1, 1, 2, 3, 3]
    assert flat.pieces.dtype == flat.image.dtype == np.int32
    for number, text in enumerate(flatten(texts)):
        pieces, word_lengths = flat.caption(number)
        words = words_of(text, t)
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


def test_a_split_is_tokenised_in_record_order(tiny, pieces_of_tiny):
    flat = tokenise.tokenise_split(tiny, "test", pieces_of_tiny)
    records = tiny.open_split("test", ("captions",))
    assert flat.image.tolist() == [row for row, record in enumerate(records) for _ in record["captions"]]
    for number, text in enumerate(flatten(record["captions"] for record in records)):
        assert flat.caption(number)[0].tolist() == pieces_of_tiny.vocabulary.pieces([text])[0]


def test_where_the_file_comes_from(vocab, tiny_folder):
    c = base.get_config()
    with pytest.raises(ValueError, match=r"no vocab\.txt is named: set text\.weights"):
        tokenise.load_tokenizer(c)
    c.tokenizer.path = str(vocab)
    assert tokenise.load_tokenizer(c).vocab_size == len(VOCABULARY)
    c.tokenizer.path = str(vocab.parent / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: WordPiece vocabulary not found"):
        tokenise.load_tokenizer(c)
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
