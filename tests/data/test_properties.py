"""Any text becomes tokens of the vocabulary, within the length, with a mask that says which."""

from __future__ import annotations

import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from data_prep import vocabulary
from shnet_jax.data import clip_bpe, tokenise
from shnet_jax.data.gallery import text_batches
from tests import siglip_example

CLIP = Path(__file__).parents[1] / "golden" / "clip" / "merges.txt"
WORDS = ("a", "red", "star", "犬", "sea", "stars", "reddish")
PIECES = (*tokenise.SPECIAL, "a", "red", "star", "犬", "sea", "##s", "##dish", ",", *string.digits)
CAPTIONS = ["a red star above the sea", "two hearts", "eine Straße – 犬", "12 boats\tand 3 dogs!"]

ODD = ("<|endoftext|>", "</w>", "\u2581", " ", "\n", "\0", "\u200f", "e\u0301", "\U0010ffff")

# Half of them are made of what a vocabulary knows: special tokens, marks of words, bytes that are none.
TEXTS = st.lists(
    st.one_of(st.text(max_size=60), st.lists(st.sampled_from([*PIECES, *ODD]), max_size=12).map("".join)),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    vocabulary.train(CAPTIONS, folder / "s.model")
    siglip_example.write_pieces(folder)
    return {
        "wordpiece": tokenise.wordpiece(folder / "vocab.txt"),
        "sentencepiece": tokenise.sentence_piece(folder / "s.model"),
        "clip": tokenise.clip(CLIP),
        "siglip": tokenise.siglip(folder / "spiece.model"),
    }


@pytest.mark.parametrize("kind", tokenise.KINDS)
@settings(max_examples=40)
@given(texts=TEXTS, most=st.sampled_from([2, 3, 8, 16]), rows=st.sampled_from([1, 2, 5]))
def test_any_text_becomes_tokens(kind, tokenizers, texts, most, rows):
    tokenizer = tokenizers[kind]
    captions = tokenise.tokenise_captions([texts[:1], texts[1:]], tokenizer)
    assert len(captions) == len(texts) and captions.first.tolist() == [0, 1, len(texts)]
    data = ConfigDict({"max_tokens": most, "token_buckets": (4, 16)})
    enclosed = []
    for number, text in enumerate(texts):
        pieces, words = captions.caption(number)
        assert pieces.tolist() == tokenizer.vocabulary.pieces([text])[0]  # whatever stands beside it
        assert words.sum() == len(pieces) and (words > 0).all()
        assert ((pieces >= 0) & (pieces < tokenizer.vocab_size)).all()
        assert kind == "clip" or not (pieces == 0).any()  # 0 is padding
        enclosed.append(tokenizer.enclose(pieces, most).tolist())
        assert 2 <= len(enclosed[-1]) <= most
        if kind == "siglip":  # filled up behind its end, by the same token
            assert len(enclosed[-1]) == most and enclosed[-1][-1] == tokenizer.fill_id
            continue
        assert (enclosed[-1][0], enclosed[-1][-1]) == (tokenizer.begin_id, tokenizer.end_id)
    seen = []
    for batch, valid, numbers in text_batches(captions, tokenizer, data, rows):
        tokens, mask = batch["tokens"], batch["token_mask"]
        assert tokens.shape == mask.shape == (rows, mask.shape[1]) and mask.shape[1] in (4, 16)
        assert not tokens[~mask].any()
        np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < mask.sum(1, keepdims=True))
        for row, number in enumerate(numbers):
            assert tokens[row][mask[row]].tolist() == enclosed[number]
        seen += numbers.tolist()
        assert valid == len(numbers)
    assert sorted(seen) == list(range(len(texts)))


@settings(max_examples=30)
@given(st.lists(st.sampled_from(WORDS), max_size=8))
def test_pieces_put_together_are_the_words(tokenizers, words):
    pieces, lengths = tokenise.tokenise_captions([[" ".join(words)]], tokenizers["wordpiece"]).caption(0)
    starts = np.cumsum(lengths) - lengths
    joined = [
        "".join(PIECES[p].removeprefix("##") for p in pieces[a : a + n]) for a, n in zip(starts, lengths, strict=True)
    ]
    assert joined == words


@settings(max_examples=40)
@given(st.text(alphabet=string.ascii_lowercase + string.digits + " éüß犬—😀!?'<>|/\u0301", max_size=40))
def test_clip_keeps_every_byte(tokenizers, text):
    bpe = tokenizers["clip"].vocabulary
    pieces = [bpe.tokenizer.id_to_token(number) for number in bpe.pieces([text])[0]]
    letters = clip_bpe._byte_order()
    values = [*(b for b in range(256) if chr(b) in letters), *(b for b in range(256) if chr(b) not in letters)]
    back = dict(zip(letters, values, strict=True))
    found = bytes(back[letter] for piece in pieces for letter in piece.removesuffix("</w>"))
    assert found.decode() == "".join(unicodedata.normalize("NFC", text).split())
