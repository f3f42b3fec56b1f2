"""Vocabularies of SigLIP, spiece.model by `sentencepiece`, and of SigLIP 2, Gemma's tokenizer.json by `tokenizers`.

Both models were trained on captions in lower case, with no token before a caption, one behind it, and the rest of a
fixed length filled up (big_vision). SigLIP's captions have no punctuation either.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import models, normalizers

from shnet_jax.data import model_folder
from shnet_jax.data.errors import DataError
from shnet_jax.data.model_folder import GENERIC, FolderVocabulary, added_tokens, below, parse_tokenizer
from shnet_jax.untrusted import read_object

WORD = "\u2581"
"""Mark at the beginning of a word, in pieces of both vocabularies."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PIECES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}  # of SigLIP; its end also fills
_GEMMA = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}  # of SigLIP 2


@dataclass(frozen=True)
class Roles:
    """Ids and flags that a tokenizer needs beside the pieces. begins_word: [vocab_size] bool, pieces that begin a word.

    max_length: tokens that the model takes, as its folder says; None: not known.
    """

    begins_word: np.ndarray
    end_id: int
    fill_id: int
    unknown_id: int
    max_length: int | None


@dataclass(frozen=True)
class SentencePieces:
    """SigLIP's vocabulary."""

    processor: sentencepiece.SentencePieceProcessor

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `SiglipTokenizer` of transformers gives them, without the one at the end.

        "</s>" and "<unk>" in a text are text.
        """
        unknown = _PIECES["unk_token"]
        before = len(self.processor.encode(unknown))  # so that the first word also begins with the mark
        lists = self.processor.encode([unknown + canonical(f"{WORD}{text.replace(WORD, ' ')}") for text in texts])
        return [ids[before:] for ids in lists]


def canonical(text: str) -> str:
    """A caption as SigLIP was trained on: lower case, no ASCII punctuation, single spaces (big_vision)."""
    return re.sub(r"\s+", " ", text.lower().translate(_NO_PUNCTUATION)).strip()


def find_vocabulary(folder: Path) -> Path:
    """The file of a SigLIP folder to read: spiece.model, else tokenizer.json. FileNotFoundError without either."""
    for name in ("spiece.model", "tokenizer.json"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} has neither spiece.model nor tokenizer.json: the weights mean nothing without them{below(folder)}"
    )


def read(path: Path) -> tuple[SentencePieces | FolderVocabulary, Roles]:
    """The vocabulary of a .model, which is SigLIP's, or of a tokenizer.json, SigLIP 2's.

    Raises FileNotFoundError for a missing file, ValueError for one that is neither, and for settings in its folder that
    are not followed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: SigLIP vocabulary not found (spiece.model, or tokenizer.json)")
    return _of_json(path) if path.suffix == ".json" else _of_pieces(path)


def _of_pieces(path: Path) -> tuple[SentencePieces, Roles]:
    settings = _settings(path, ("SiglipTokenizer", "PreTrainedTokenizer"), _PIECES)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise DataError(f"{path}: expected a SentencePiece model (cut off?): {error}", file=path.name) from None
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    return SentencePieces(processor), _roles(path, {piece: i for i, piece in enumerate(pieces)}, _PIECES, settings)


def _of_json(path: Path) -> tuple[FolderVocabulary, Roles]:
    settings = _settings(path, ("GemmaTokenizer", "Siglip2Tokenizer", *GENERIC), _GEMMA)
    described = read_object(path)
    tokenizer = parse_tokenizer(path, described, "SigLIP 2's")
    if not isinstance(tokenizer.model, models.BPE) or tokenizer.model.end_of_word_suffix:
        raise ValueError(f"{path}: expected a BPE whose words begin with {WORD}, as Gemma's, which SigLIP 2 has")
    steps = [normalizers.Lowercase()] + ([tokenizer.normalizer] if tokenizer.normalizer else [])
    tokenizer.normalizer = normalizers.Sequence(steps)
    if WORD not in tokenizer.normalizer.normalize_str("a dog"):
        raise ValueError(f"{path}: expected a normalizer that puts {WORD} for a space, as Gemma's")
    ids = tokenizer.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path}: expected consecutive ids of its {len(ids)} pieces")
    roles = _roles(path, ids, _GEMMA, settings)
    return FolderVocabulary(tokenizer, roles.max_length), roles


def _settings(path: Path, classes: tuple[str, ...], tokens: dict[str, str]) -> model_folder.Settings:
    """The settings beside a vocabulary. Raises ValueError where they ask for other tokens, or for capitals."""
    settings = model_folder.read_settings(path.parent, classes, tokens)
    for role, token in settings.tokens.items():
        if token != tokens[role]:
            raise ValueError(f"{settings.folder}: {role} is {token!r:.80} in the settings; expected {tokens[role]}")
    if settings.flag("do_lower_case") is False:
        raise ValueError(
            f"{settings.folder / model_folder.CONFIG}: do_lower_case is false; SigLIP was trained on lower case"
        )
    return settings


def _roles(path: Path, ids: dict[str, int], tokens: dict[str, str], settings: model_folder.Settings) -> Roles:
    if missing := sorted({*tokens.values()} - ids.keys()):
        raise ValueError(f"{path}: {len(ids)} pieces but no {', '.join(missing)}")
    if strange := [t["content"] for t in added_tokens(path, ids, settings) if t["content"] not in ids]:
        raise ValueError(f"{path} has no {strange[0]!r:.80}, an added token in the settings beside it")
    begins = np.zeros(len(ids), bool)
    begins[[number for piece, number in ids.items() if piece.startswith(WORD)]] = True
    end, fill, unknown = (ids[tokens[role]] for role in ("eos_token", "pad_token", "unk_token"))
    return Roles(begins, end, fill, unknown, settings.max_length())
