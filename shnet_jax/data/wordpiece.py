"""BERT's WordPiece from the files of a local folder, by the `tokenizers` package.

A vocab.txt with the settings beside it, or a tokenizer.json, becomes one description: a tokenizer.json of what decides
the tokens and nothing else, and of the special tokens by their roles. A run keeps it, as its folder has no settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models

from shnet_jax.data import model_folder
from shnet_jax.data.model_folder import GENERIC, MAX_ID, FolderVocabulary, Settings, added_tokens, below, read_lines
from shnet_jax.untrusted import read_object

ROLES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
ROLES_FIELD = "special_tokens"
"""Field of our description, the special tokens by their roles, that a tokenizer.json does not have."""
CASED = 0.01
"""Share of pieces with capital letters from which on a vocabulary is taken for a cased one; uncased ones have none."""

_NORMALIZER = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
_UNCASED = _NORMALIZER | {"lowercase": True}
_MODEL = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


@dataclass(frozen=True)
class WordPiece(FolderVocabulary):
    """A vocabulary (see `tokenise`).

    starts_word: [vocab_size] bool, pieces that begin a word. ids: of the special tokens by their roles.
    description: all that decides the tokens, as a tokenizer.json has it.
    """

    starts_word: np.ndarray
    ids: Mapping[str, int]
    description: Mapping[str, Any]

    def kept(self) -> tuple[str, bytes]:
        """Suffix and contents of the one file that says all: a vocab.txt where the tokens are BERT's uncased ones."""
        vocabulary = self.description["model"]["vocab"]
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        if self.description == _describe({piece: number for number, piece in enumerate(pieces)}):
            return ".txt", ("\n".join(pieces) + "\n").encode()
        return ".json", json.dumps(self.description, indent=0, sort_keys=True).encode()


def find_vocabulary(folder: Path) -> Path:
    """The file of a BERT folder to read: tokenizer.json, else vocab.txt.

    Raises FileNotFoundError without either, ValueError where they are not the same vocabulary.
    """
    listed, described = folder / "vocab.txt", folder / "tokenizer.json"
    if not described.is_file() and not listed.is_file():
        raise FileNotFoundError(
            f"{folder}: tokenizer.json or vocab.txt is missing: the weights mean nothing without their vocabulary"
            f"{below(folder)}"
        )
    if not (described.is_file() and listed.is_file()):
        return described if described.is_file() else listed
    pieces = {piece: number for number, piece in enumerate(read_lines(listed, "a vocab.txt"))}
    vocabulary = read(described)
    ids = vocabulary.tokenizer.get_vocab()
    added, roles = vocabulary.description["added_tokens"], vocabulary.description[ROLES_FIELD]
    beside = {*(token["content"] for token in added), *roles.values()} - pieces.keys()
    if differ := [piece for piece in pieces | ids if pieces.get(piece) != ids.get(piece) and piece not in beside]:
        raise ValueError(
            f"{listed} and {described.name} beside it are different vocabularies: {differ[0]!r:.80} is "
            f"{pieces.get(differ[0], 'absent')} and {ids.get(differ[0], 'absent')}; name the one that the weights "
            "were trained with, --config.tokenizer.path=FILE"
        )
    return described


def read(path: Path) -> WordPiece:
    """The vocabulary of a vocab.txt (a piece a line, whose number is its id) or of a tokenizer.json.

    The settings in the folder of the file are followed. Raises FileNotFoundError for a missing file, ValueError for one
    that is no WordPiece vocabulary, or with settings that are not followed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: WordPiece vocabulary not found (a vocab.txt, or a tokenizer.json)")
    of_json = path.suffix == ".json"
    settings = model_folder.read_settings(path.parent, CLASSES + GENERIC if of_json else CLASSES, ROLES)
    description = _of_json(path, settings) if of_json else _of_list(path, settings)
    vocabulary, roles = description["model"]["vocab"], description[ROLES_FIELD]
    tokenizer = _load(path, {field: value for field, value in description.items() if field != ROLES_FIELD})
    ids = tokenizer.get_vocab()
    role_ids = model_folder.special_ids(path, ids, roles)
    if (size := max(ids.values()) + 1) > MAX_ID:
        raise ValueError(f"{path}: the largest id is {size - 1}; expected one below {MAX_ID}")
    starts_word = np.ones(size, bool)
    prefix = description["model"]["continuing_subword_prefix"]
    starts_word[[number for piece, number in vocabulary.items() if piece.startswith(prefix)]] = False
    return WordPiece(tokenizer, settings.max_length(), starts_word, role_ids, description)


def _load(path: Path, described: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = model_folder.parse_tokenizer(path, described, "WordPiece")
    ids = tokenizer.get_vocab()
    for token in described.get("added_tokens") or []:
        if ids.get(token["content"]) != token["id"]:  # it is given another one without a word
            raise ValueError(
                f"{path}: the added token {token['content']!r:.80} has the id {token['id']}; expected the one after "
                "the pieces and the added tokens before it"
            )
    return tokenizer


def _describe(
    vocabulary: dict[str, int],
    normalizer: Mapping[str, Any] = _UNCASED,
    roles: Mapping[str, str] = ROLES,
    added: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Description (tokenizer.json) of BERT's tokenizer with these settings."""
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": _MODEL | {"unk_token": roles["unk_token"], "vocab": vocabulary},
        "added_tokens": list(added),
        ROLES_FIELD: dict(roles),
    }


def _of_list(path: Path, settings: Settings) -> dict[str, Any]:
    """The description of a vocab.txt. That of a run, vocabulary.txt, is BERT's uncased one whatever its pieces are."""
    pieces = read_lines(path, "a vocab.txt")
    lower = settings.flag("do_lower_case")
    if lower is None and path.name != "vocabulary.txt":
        _check_uncased(path, pieces, settings)
    chinese = settings.flag("tokenize_chinese_chars")
    normalizer = _UNCASED | {
        "lowercase": lower is not False,
        "strip_accents": settings.flag("strip_accents"),
        "handle_chinese_chars": chinese is not False,
    }
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    roles = ROLES | dict(settings.tokens)
    for token in settings.added:
        if token["content"] in roles.values() and token["id"] is not None:
            vocabulary.setdefault(token["content"], token["id"])
    return _describe(vocabulary, normalizer, roles, _tokens_beside(path, vocabulary, [], roles, settings))


def _check_uncased(path: Path, pieces: Sequence[str], settings: Settings) -> None:
    capitals = [piece for piece in pieces if piece != piece.lower() and not piece.startswith("[")]
    if len(capitals) > CASED * len(pieces) or settings.cased:
        why = (
            f"config.json names {settings.cased}"
            if settings.cased
            else f"pieces such as {capitals[0]!r:.40} have capitals"
        )
        raise ValueError(
            f"{path}: nothing beside it says whether captions are lower-cased, and {why}, as in a cased vocabulary: "
            f'write {{"do_lower_case": false}}, or true, into {settings.folder / model_folder.CONFIG}'
        )


def _of_json(path: Path, settings: Settings) -> dict[str, Any]:
    """The description of a tokenizer.json, also of our own."""
    described = read_object(path)
    roles = described.pop(ROLES_FIELD, None)
    model = described.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path}: expected a tokenizer.json with a model")
    tokenizer = _load(path, described)
    if not isinstance(tokenizer.model, models.WordPiece) or not tokenizer.model.continuing_subword_prefix:
        raise ValueError(
            f"{path} holds a {type(tokenizer.model).__name__} vocabulary; tokenizer.kind='wordpiece' reads "
            "WordPiece with a prefix such as ##; 'clip' reads CLIP's BPE, 'sentencepiece' the .model of SentencePiece"
        )
    if roles is None:
        model_folder.check_agreement(path, tokenizer, settings)
        roles = _roles(path, tokenizer, settings)
    elif not isinstance(roles, dict) or roles.keys() != ROLES.keys() or {*map(type, roles.values())} != {str}:
        raise ValueError(f"{path}: {ROLES_FIELD} is {roles!r:.80}, expected a token for each of {', '.join(ROLES)}")
    ids = tokenizer.get_vocab()
    vocabulary = model["vocab"] | {name: ids[name] for name in roles.values() if name in ids}
    added = described.get("added_tokens") or []
    normalizer = described.get("normalizer")
    if normalizer == _UNCASED | {"strip_accents": True}:
        normalizer = _UNCASED
    return {
        "normalizer": normalizer,
        "pre_tokenizer": described.get("pre_tokenizer"),
        "model": {
            **_MODEL,
            "unk_token": roles["unk_token"],
            "vocab": vocabulary,
            "continuing_subword_prefix": tokenizer.model.continuing_subword_prefix,
            "max_input_chars_per_word": tokenizer.model.max_input_chars_per_word,
        },
        "added_tokens": _tokens_beside(path, ids, added, roles, settings),
        ROLES_FIELD: roles,
    }


def _roles(path: Path, tokenizer: tokenizers.Tokenizer, settings: Settings) -> dict[str, str]:
    """Special tokens by role: those of the tokenizer, else those of the settings, else BERT's own."""
    does = {"unk_token": tokenizer.model.unk_token}
    if ends := model_folder.enclosing_tokens(path, tokenizer, "WordPiece"):
        does |= {"cls_token": ends[0], "sep_token": ends[1]}
    for role, name in does.items():
        if settings.tokens.get(role, name) != name:
            raise ValueError(
                f"{path}: {role} is {name!r:.80} there, {settings.tokens[role]!r:.80} in the settings beside it"
            )
    return ROLES | dict(settings.tokens) | does


def _tokens_beside(
    path: Path,
    ids: Mapping[str, int],
    listed: Sequence[Mapping[str, Any]],
    roles: Mapping[str, str],
    settings: Settings,
) -> list[dict[str, Any]]:
    """Tokens that are found in a caption as a whole, by their ids: added ones, but not the special ones by role.

    "[MASK]" in a caption is text, not a mask. ids: of what is known already. listed: those of a tokenizer.json.
    """
    tokens = {token["content"]: dict(token) for token in listed}
    for token in added_tokens(path, ids, settings):
        tokens.setdefault(token["content"], token)
    beside = [token for text, token in tokens.items() if text not in roles.values()]
    return sorted(beside, key=lambda token: token["id"])
