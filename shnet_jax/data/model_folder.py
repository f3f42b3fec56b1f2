"""Tokenizer settings beside a vocabulary, in a folder as Hugging Face's `transformers` saves models.

Read are tokenizer_config.json, special_tokens_map.json, added_tokens.json and the little that config.json and
sentence_bert_config.json say of tokens. A setting that is not followed is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from shnet_jax.untrusted import check_kind, read_object

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MAX_ID = 10**6
"""Upper bound on token ids: an array of that size is allocated before anything else is checked."""
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
"""Classes of `transformers` of which everything is in the tokenizer.json."""

_Kind = TypeVar("_Kind", dict[str, Any], list[Any])

# What we do; a folder that asks for something else gets an error. None is as good as absent.
_ONLY = {"do_basic_tokenize": True, "clean_text": True, "wordpieces_prefix": "##", "auto_map": None}
_ONLY |= {"truncation_side": "right", "padding_side": "right"}
_ONLY |= {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}  # of Japanese


@dataclass(frozen=True)
class FolderVocabulary:
    """A vocabulary of the `tokenizers` package. max_length: tokens that its model takes; None: not known."""

    tokenizer: tokenizers.Tokenizer
    max_length: int | None

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [encoded.ids for encoded in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


@dataclass(frozen=True)
class Settings:
    """The settings of a folder, all of them optional.

    values: of tokenizer_config.json. tokens: roles ("unk_token", ...) and what fills them. added: id, content and flags
    of tokens beside the vocabulary, as tokenizer.json has them. cased: config.json names a cased model.
    """

    folder: Path
    values: Mapping[str, Any]
    tokens: Mapping[str, str]
    added: tuple[dict[str, Any], ...]
    cased: str

    def flag(self, name: str) -> bool | None:
        """Boolean setting; None where it is absent or null. Raises ValueError for any other value."""
        value = self.values.get(name)
        if value is not None and type(value) is not bool:
            raise ValueError(f"{self.folder / CONFIG}: {name} is {value!r:.80}, expected true or false")
        return value

    def max_length(self) -> int | None:
        """Longest input of the model in tokens, as its files state."""
        for name in ("model_max_length", "max_len"):
            value = self.values.get(name)
            if value is not None:
                if type(value) not in (int, float) or not value >= 1:
                    raise ValueError(f"{self.folder / CONFIG}: {name} is {value!r:.80}, expected a number of tokens")
                return int(min(value, MAX_ID))  # 1e30 where there is no limit
        return None


def read_settings(folder: Path, classes: tuple[str, ...], roles: Mapping[str, str]) -> Settings:
    """The settings of a folder. classes: of `transformers`, whose tokens the caller makes. roles: names and defaults.

    Raises ValueError for a file that is none, and for a setting that the caller does not follow.
    """
    path = folder / CONFIG
    values, named, model = _optional(path), _optional(folder / MAP), _optional(folder / "config.json")
    for place, document in ((path, values), (folder / "config.json", model)):
        name = document.get("tokenizer_class")
        if name is not None:
            if str(name).removesuffix("Fast") not in classes:
                raise ValueError(f"{place}: tokenizer_class is {name!r:.80}; read are those of {', '.join(classes)}")
            break
    for name, expected in _ONLY.items():
        if values.get(name) not in (None, expected):
            raise ValueError(f"{path}: {name} is {values[name]!r:.80}; expected {json.dumps(expected)} or nothing")
    tokens = {}
    for role in roles:
        texts = {p: t for p, document in ((path, values), (folder / MAP, named)) if (t := _content(p, document, role))}
        if len(set(texts.values())) > 1:
            raise ValueError(f"{role} is " + ", ".join(f"{text!r:.80} in {place}" for place, text in texts.items()))
        if texts:
            tokens[role] = next(iter(texts.values()))
    known = {*roles.values(), *tokens.values()}
    if strange := [t for t in _field(path, values, "never_split", list) if t not in known]:
        raise ValueError(f"{path}: never_split is {strange!r:.200}; expected special tokens, or nothing")
    sentences = folder / "sentence_bert_config.json"
    if _optional(sentences).get("do_lower_case"):
        if values.get("do_lower_case") is False:
            raise ValueError(f"{sentences}: do_lower_case is true, in {path} false; expected the same")
        values = values | {"do_lower_case": True}
    source = model.get("_name_or_path") or values.get("name_or_path") or ""
    cased = source if isinstance(source, str) and "cased" in source.lower().replace("uncased", "") else ""
    return Settings(folder, values, tokens, tuple(_added(folder, values, named)), cased)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _content(path: Path, document: Mapping[str, Any], role: str) -> str:
    """Content of a token that is written as a text or as an object with its flags; "" for none."""
    value = document.get(role)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{path}: {role} is {value!r:.80}, expected a text")
    return text or ""


def _field(path: Path, document: Mapping[str, Any], name: str, kind: type[_Kind]) -> _Kind:
    """The object or list in a field of a document; an empty one where there is none."""
    value = document.get(name) or kind()
    if not isinstance(value, kind):
        raise ValueError(f"{path}: {name} is {value!r:.80}, expected {'a list' if kind is list else 'an object'}")
    return value


def _added(folder: Path, values: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tokens added to the vocabulary. Those that are only listed as special have no id of their own: None."""
    entries = {text: {"id": number, "normalized": True} for text, number in _optional(folder / ADDED).items()}
    path = folder / CONFIG
    for number, entry in _field(path, values, "added_tokens_decoder", dict).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not number.isdecimal():
            raise ValueError(
                f"{path}: added_tokens_decoder has {number!r:.80}: {entry!r:.80}, expected ID: {{content}}"
            )
        text = entry["content"]
        if (older := entries.get(text, {"id": int(number)})["id"]) != int(number):
            raise ValueError(f"{folder / ADDED}: {text!r:.80} is {older!r:.80}, {number} in {path}")
        entries[text] = entry | {"id": int(number)}
    for place, document in ((path, values), (folder / MAP, named)):
        listed = [*_field(place, document, "additional_special_tokens", list)]
        other = document.get("extra_special_tokens")
        listed += other.values() if isinstance(other, dict) else _field(place, document, "extra_special_tokens", list)
        for token in listed:
            entries.setdefault(_content(place, {"a special token": token}, "a special token"), {"special": True})
    for text, entry in entries.items():
        token_id = entry.get("id")
        if token_id is not None and (type(token_id) is not int or not 0 <= token_id < MAX_ID):
            raise ValueError(f"{folder / ADDED}: {text!r:.80} is {token_id!r:.80}, not a number below {MAX_ID}")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        yield {"id": token_id, "content": text} | {flag: bool(entry.get(flag, False)) for flag in flags}


def added_tokens(path: Path, ids: Mapping[str, int], settings: Settings) -> Iterator[dict[str, Any]]:
    """The added tokens of the settings, each with its id. ids: of what the vocabulary at `path` knows already."""
    for token in settings.added:
        known = ids.get(token["content"])
        number = known if token["id"] is None else token["id"]
        if number is None or known not in (None, number):
            raise ValueError(
                f"{path}: the added token {token['content']!r:.80} is {'absent' if known is None else known} there, "
                f"{'without an id' if token['id'] is None else token['id']} in the settings beside it"
            )
        yield token | {"id": number}


def below(folder: Path) -> str:
    """The end of an error about a folder without a model: where Sentence Transformers has put it, if it is theirs."""
    inner = next((path.parent for path in sorted(folder.glob("0_*/config.json"))), None)
    return f"; give the folder of the model in it, {inner}" if inner else ""


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a vocabulary, without empty ones at its end. Raises ValueError for a file of another kind."""
    check_kind(path)
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {what} in UTF-8: {error}") from None


@contextmanager
def vocabulary_faults(path: Path, what: str) -> Iterator[None]:
    """Context that turns errors of `tokenizers` about a vocabulary, which are plain Exceptions, into ValueErrors."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: no vocabulary of {what}: {error}") from None


def parse_tokenizer(path: Path, described: Mapping[str, Any], what: str) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes, without its truncation and padding. Raises ValueError."""
    with vocabulary_faults(path, what):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def enclosing_tokens(path: Path, tokenizer: tokenizers.Tokenizer, what: str) -> tuple[str, str] | None:
    """The tokens that a tokenizer puts before and behind a caption; None where it adds none.

    Raises ValueError for one that adds any others.
    """
    with vocabulary_faults(path, what):
        enclosed, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    if enclosed.ids == bare.ids:
        return None
    if enclosed.ids[1:-1] != bare.ids or any(enclosed.type_ids):
        raise ValueError(
            f"{path}: its post_processor makes {' '.join(enclosed.tokens)} of 'a'; expected one token before a caption "
            "and one behind it, all of type 0"
        )
    return enclosed.tokens[0], enclosed.tokens[-1]


def special_ids(path: Path, ids: Mapping[str, int], roles: Mapping[str, str]) -> dict[str, int]:
    """Ids of the special tokens by role. ids: of all pieces.

    Raises ValueError for a vocabulary that lacks one, or whose padding is not id 0.
    """
    if missing := [name for name in roles.values() if name not in ids]:
        raise ValueError(f"{path}: {len(ids)} pieces but no {', '.join(missing)} (needed: {', '.join(roles.values())})")
    if ids[roles["pad_token"]]:
        first = next((piece for piece, number in ids.items() if number == 0), None)
        raise ValueError(f"{path}: piece 0 is {first!r}; padding must be id 0: {roles['pad_token']} was expected there")
    return {role: ids[name] for role, name in roles.items()}


def check_agreement(path: Path, tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
    """Raises ValueError where a tokenizer.json changes texts otherwise than the settings beside it say."""
    change = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    does = {
        "do_lower_case": change("A") == "a",
        "strip_accents": change("\u00e9") == "e",
        "tokenize_chinese_chars": " " in change("\u72ac\u72ac").strip(),
    }
    lower, strip = settings.flag("do_lower_case"), settings.flag("strip_accents")
    says = {
        "do_lower_case": lower,
        "strip_accents": lower if strip is None and "strip_accents" in settings.values else strip,
        "tokenize_chinese_chars": settings.flag("tokenize_chinese_chars"),
    }
    for name, value in says.items():
        if value is not None and value != does[name]:
            raise ValueError(
                f"{settings.folder / CONFIG}: {name} amounts to {json.dumps(value)}, {path.name} beside it does the "
                f"opposite; change the one of the two that is not as the weights were trained"
            )
