"""Trains the SentencePiece model that is kept beside a data set, on its own captions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 8000  # upper bound; a small set gets as many pieces as its captions support
_MAX_CAPTION_BYTES = 8192
_MAX_CAPTIONS = 100_000  # a random choice of this many is enough to learn the pieces; they take 150 MB and a minute


def train(captions: Iterable[str], model_file: Path) -> None:
    """Train a unigram model on captions and write it to `model_file`.

    Ids: 0 [PAD] (a batch is 0 where masked), 1 [UNK], 2 [CLS], 3 [SEP], 4 [MASK]. Case is folded, as in the
    uncased vocabularies that retrieval models use.
    """
    sentencepiece.set_random_generator_seed(0)  # of the shuffling: the same captions give the same pieces
    with model_file.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(caption.split()) for caption in captions),
            model_writer=out,
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
            input_sentence_size=_MAX_CAPTIONS,
            shuffle_input_sentence=True,
            max_sentence_length=_MAX_CAPTION_BYTES,
            num_threads=1,
            minloglevel=2,
        )
