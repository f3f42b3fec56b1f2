"""Trains the SentencePiece model that is kept beside a data set, on its own captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import sentencepiece

from data_prep.schema import DataError

VOCAB_SIZE = 8000  # upper bound; a small set gets as many pieces as its captions support
_MAX_CHARACTERS = 256  # of a word; more of it is not looked at
_MAX_WORDS = 100_000  # different words that are counted at once, four times those of COCO; rare ones make room
_MAX_COUNTED = 300_000  # occurrences that the trainer is told of; it takes 100 bytes for each (30 MB)


def train(captions: Iterable[str], model_file: Path) -> None:
    """Train a unigram model on captions and write it to `model_file`.

    Ids: 0 [PAD] (a batch is 0 where masked), 1 [UNK], 2 [CLS], 3 [SEP], 4 [MASK]. Case is folded, as in the
    uncased vocabularies that retrieval models use. Memory is that of the different words, however many captions.

    Raises DataError when no caption has a visible character.
    """
    counts = _count(captions)
    if not any(map(str.isprintable, chain.from_iterable(counts))):
        raise DataError("captions: expected visible characters to learn a vocabulary from, found none")
    with model_file.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_weighted(counts),
            model_writer=out,
            input_format="tsv",
            model_type="unigram",
            vocab_size=VOCAB_SIZE,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            control_symbols=["[MASK]"],
            num_threads=1,
            minloglevel=2,
        )


def _count(captions: Iterable[str]) -> Counter[str]:
    """How often each word occurs; when there are too many, the rarer half is forgotten."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(word[:_MAX_CHARACTERS] for word in caption.split())
        if len(counts) > _MAX_WORDS:
            counts = Counter(dict(counts.most_common(_MAX_WORDS // 2)))
    return counts


def _weighted(counts: Counter[str]) -> Iterator[str]:
    """Lines of SentencePiece's tsv format: text, tab, how often it occurs; each word does at least once.

    The trainer starts from substrings that are found twice with different characters behind them. Of sentences it so
    misses most frequent words, behind which there is always a space ("striped" became " s", "tri", "ped"). Here every
    word that occurs twice has a space behind it in one place and the end of a line in another.
    """
    share = min(1.0, _MAX_COUNTED / max(1, counts.total()))
    for word, count in sorted(counts.items()):
        weight = max(1, round(count * share))
        if weight > 1:
            yield f"{word} {word}\t1"
        if weight != 2:
            yield f"{word}\t{max(1, weight - 2)}"
