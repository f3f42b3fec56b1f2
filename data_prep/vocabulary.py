"""Trains the SentencePiece model that is kept beside a data set, on its own captions."""

from __future__ import annotations

import heapq
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from zlib import crc32

import sentencepiece

from data_prep.schema import DataError

VERSION = 2  # raised when the same captions give other pieces
VOCAB_SIZE = 8000  # upper bound; a small set gets as many pieces as its captions support
_MAX_CHARACTERS = 256  # of a word; what is longer, as captions without spaces are, counts as several
_MAX_WORDS = 100_000  # different words that are counted at once; rare ones make room
_MAX_COUNTED = 350_000  # occurrences that the trainer is told of: SentencePiece 0.2.3 takes 20 bytes for each character


def train(captions: Iterable[str], model_file: Path) -> None:
    """Train a unigram model on captions and write it to `model_file`.

    Ids: 0 [PAD] (a batch is 0 where masked), 1 [UNK], 2 [CLS], 3 [SEP], 4 [MASK]. Case is folded, as in the
    uncased vocabularies that retrieval models use. Memory is bounded, however many captions; their order matters
    only beyond _MAX_WORDS different words.

    Raises DataError when nothing can be learned from the captions, as when none has a visible character.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_weighted(_count(captions)),
            model_writer=model,
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
    except RuntimeError as error:
        raise DataError(
            f"captions: no vocabulary can be learned from them; are there visible characters? {error}"
        ) from None
    model_file.write_bytes(model.getvalue())


def _count(captions: Iterable[str]) -> Counter[str]:
    """Count of each word; when there are too many, the rarer half is dropped, of equally rare ones any."""
    counts: Counter[str] = Counter()
    for caption in captions:
        for word in caption.split():
            counts.update(word[at : at + _MAX_CHARACTERS] for at in range(0, len(word), _MAX_CHARACTERS))
        if len(counts) > _MAX_WORDS:
            counts = Counter(
                dict(heapq.nlargest(_MAX_WORDS // 2, counts.items(), key=lambda it: (it[1], _hash(it[0]))))
            )
    return counts


def _weighted(counts: Counter[str]) -> Iterator[str]:
    """Lines of SentencePiece's tsv format: text, tab, how often it occurs.

    The trainer starts from substrings that are found twice with different characters behind them. Of sentences it so
    misses most frequent words, behind which there is always a space ("striped" became " s", "tri", "ped"). Here a
    word that occurs twice has a space behind it in one place and the end of a line in another.
    """
    share = min(1.0, _MAX_COUNTED / max(1, counts.total()))
    for word, count in sorted(counts.items()):
        # Rounded up as often as the fraction says, by chance: else rare words, which are many, weigh too much.
        weight = int(count * share + _hash(word)) if share < 1 else count
        if weight > 1:
            yield f"{word} {word}\t1"
        if weight not in (0, 2):
            yield f"{word}\t{max(1, weight - 2)}"


def _hash(word: str) -> float:
    """A number in 0 <= x < 1 that looks drawn and is always the same."""
    return crc32(word.encode()) / 2**32
