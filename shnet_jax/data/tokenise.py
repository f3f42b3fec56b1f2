"""The kinds of vocabularies behind one call, and the captions of a split as flat integer arrays.

Augmentation works on words (3SHNet, text tower of the released code), so a tokenizer also says which pieces
start a word. All vocabularies mark that in the piece itself ("##" continues a word, "\u2581" starts one, "</w>" ends
one): a table over the vocabulary is all that is needed, and a split of half a million captions becomes three arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data import clip_bpe, siglip_tokens
from shnet_jax.data import wordpiece as bert
from shnet_jax.data.checksums import check_files
from shnet_jax.data.errors import DataError
from shnet_jax.data.model_folder import CONFIG, special_ids
from shnet_jax.data.records import SENTENCEPIECE, DataSet, find_dataset

SPECIAL = tuple(bert.ROLES.values())
"""Default special tokens of WordPiece; data_prep/vocabulary.py trains SentencePiece with them."""
KINDS = ("wordpiece", "sentencepiece", "clip", "siglip")
NO_MASK = -1
"""mask_id of a vocabulary without a mask token."""
NO_UNKNOWN = -1
"""unknown_id of a vocabulary that can spell everything."""
NO_BEGIN = -1
"""begin_id of a vocabulary that puts no token before a caption."""
NO_FILL = -1
"""fill_id of a vocabulary whose captions have their own lengths."""
_CHUNK = 8192  # captions handed to a tokenizer at once: large enough for its threads, small enough for memory


class _Vocabulary(Protocol):
    """Interface of a vocabulary: the part of a tokenizer that depends on its kind."""

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its special tokens. Id 0 is padding; WordPiece and SentencePiece never produce it.

    marks_word:  [vocab_size] bool, pieces that begin a word or, if `marks_ends`, that end one.
    begin_id, end_id: tokens around every caption, [CLS] and [SEP]. unknown_id: of what has no piece.
    fill_id: token behind a caption up to the longest length, which its model reads as all others (SigLIP).
    max_length: tokens of a caption that the vocabulary's model takes, by its own account.
    random_range: ids first..last-1 that may be drawn as random tokens: the longest run without a special one.
    """

    vocabulary: _Vocabulary
    marks_word: np.ndarray
    mask_id: int
    begin_id: int
    end_id: int
    random_range: tuple[int, int]
    marks_ends: bool = False
    unknown_id: int = NO_UNKNOWN
    fill_id: int = NO_FILL
    max_length: int | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.marks_word)

    def begins_word(self, pieces: np.ndarray) -> np.ndarray:
        """Mask [p] bool of the pieces [p] of concatenated texts that begin a word."""
        marked = self.marks_word[pieces]
        return np.append(True, marked[:-1])[: len(pieces)] if self.marks_ends else marked

    def enclose(self, pieces: Sequence[int] | np.ndarray, max_tokens: int) -> np.ndarray:
        """Token ids [m] int32 of a caption: its pieces between begin and end token, cut so that m <= max_tokens.

        With a `fill_id`, m = max_tokens.
        """
        before = int(self.begin_id != NO_BEGIN)
        kept = pieces[: max_tokens - 1 - before]
        end = before + len(kept)
        ids = np.full(end + 1 if self.fill_id == NO_FILL else max_tokens, self.fill_id, np.int32)
        ids[:before], ids[before:end], ids[end] = self.begin_id, kept, self.end_id
        return ids


@dataclass(frozen=True)
class Captions:
    """All captions of a split as pieces without special tokens; caption t belongs to image `image[t]`.

    pieces:  [P] int32, pieces of all captions one after the other.
    words:   [W + 1] int32, where each word begins in `pieces`.
    offsets: [T + 1] int32, where each caption begins in `words`.
    first:   [N + 1] int32, first caption of each image.
    """

    pieces: np.ndarray
    words: np.ndarray
    offsets: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def images(self) -> int:
        """Number of images in the split, N."""
        return len(self.first) - 1

    @cached_property
    def image(self) -> np.ndarray:
        """Image of each caption, [T] int32."""
        return np.repeat(np.arange(self.images, dtype=np.int32), np.diff(self.first))

    def caption(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces [m] of caption t and the number of pieces [w] of each of its words."""
        edges = self.words[self.offsets[t] : self.offsets[t + 1] + 1]
        return self.pieces[edges[0] : edges[-1]], np.diff(edges)

    def lengths(self) -> np.ndarray:
        """Number of pieces of each caption, [T] int32."""
        return np.diff(self.words[self.offsets])

    def unknown_share(self, tokenizer: Tokenizer) -> float:
        """Fraction of pieces that are the unknown token, 0..1."""
        return float(np.mean(self.pieces == tokenizer.unknown_id)) if len(self.pieces) else 0.0


def tokenise_captions(captions: Iterable[Sequence[str]], tokenizer: Tokenizer) -> Captions:
    """Tokenise the captions of every image, given image by image; an iterator is read once and not kept."""
    counts: list[int] = []
    pending: list[str] = []
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for texts in captions:
        counts.append(len(texts))
        pending.extend(texts)
        if len(pending) >= _CHUNK:
            parts.append(_flatten(pending, tokenizer))
            pending = []
    parts.append(_flatten(pending, tokenizer))
    pieces, word_lengths, caption_words = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Captions(pieces, _offsets(word_lengths), _offsets(caption_words), _offsets(np.asarray(counts, np.int32)))


def counted_captions(counts: np.ndarray) -> Captions:
    """Captions of which the numbers alone are known; counts: [N], captions of each image."""
    none = np.zeros(1, np.int32)
    return Captions(none[:0], none, np.zeros(int(counts.sum()) + 1, np.int32), _offsets(counts.astype(np.int32)))


def tokenise_split(dataset: DataSet, split: str, tokenizer: Tokenizer) -> Captions:
    """Tokenise all captions of a split of a data set."""
    return tokenise_captions(dataset.captions(split), tokenizer)


def _flatten(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenises texts: pieces [p], number of pieces of each word [w], number of words of each text [t], all int32."""
    lists = tokenizer.vocabulary.pieces(texts)
    lengths = np.fromiter(map(len, lists), np.int32, len(lists))
    ends = np.cumsum(lengths)
    pieces = np.fromiter((piece for ids in lists for piece in ids), np.int32, int(lengths.sum()))
    first = tokenizer.begins_word(pieces)
    first[(ends - lengths)[lengths > 0]] = True  # a caption never continues the last word of the one before
    starts = np.flatnonzero(first)
    words = np.searchsorted(starts, ends) - np.searchsorted(starts, ends - lengths)
    return pieces, np.diff(starts, append=len(pieces)).astype(np.int32), words.astype(np.int32)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    # Without an array of int64 between, twice as large as all that is kept.
    np.cumsum(lengths, dtype=np.int32, out=offsets[1:])
    return offsets


def load_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names, of `vocabulary_file`.

    Raises ValueError for an unknown kind, no file named, a vocabulary without the special tokens or settings in its
    folder that are not followed, FileNotFoundError for a missing file.
    """
    path = vocabulary_file(config)
    readers = {"wordpiece": wordpiece, "sentencepiece": sentence_piece, "clip": clip, "siglip": siglip}
    tokenizer = readers[config.tokenizer.kind](path)
    if tokenizer.max_length is not None and config.data.max_tokens > tokenizer.max_length:
        raise ValueError(
            f"config.data.max_tokens is {config.data.max_tokens}, the model_max_length in {path.parent / CONFIG} "
            f"{tokenizer.max_length}: its model has not learned longer captions"
        )
    if tokenizer.mask_id == NO_MASK and config.data.word_change > 0 and config.data.word_mask > 0:
        raise ValueError(f"config.data.word_mask is {config.data.word_mask}, but {path} has no mask token: set it to 0")
    return tokenizer


def kept_vocabulary(config: ConfigDict | FrozenConfigDict) -> tuple[str, bytes]:
    """Suffix and contents of the vocabulary file that a run keeps; it alone reproduces the same tokens.

    ("", b"") for a run on stored vectors without a vocabulary.
    """
    if not has_vocabulary(config):
        return "", b""
    path = vocabulary_file(config)
    return bert.read(path).kept() if config.tokenizer.kind == "wordpiece" else (path.suffix, path.read_bytes())


def has_vocabulary(config: ConfigDict | FrozenConfigDict) -> bool:
    """Whether a vocabulary is named or the data set has a SentencePiece model. Raises as `vocabulary_file`."""
    path = vocabulary_file(config)
    return bool(config.tokenizer.path) or path.is_file()


def vocabulary_file(config: ConfigDict | FrozenConfigDict) -> Path:
    """The file of the vocabulary: tokenizer.path, or in that folder, else the data set's own SentencePiece model.

    Raises ValueError for an unknown kind and no file named, DataError for a model unlike its checksum.
    """
    kind = config.tokenizer.kind
    if kind not in KINDS:
        raise ValueError(f"tokenizer.kind is {kind!r}; known: {', '.join(KINDS)}")
    if config.tokenizer.path:
        path = Path(config.tokenizer.path).expanduser()
        find = {
            "wordpiece": bert.find_vocabulary,
            "clip": clip_bpe.find_vocabulary,
            "siglip": siglip_tokens.find_vocabulary,
        }.get(kind)
        return find(path) if find and path.is_dir() else path
    if kind in ("clip", "siglip"):
        files, model = ("merges.txt", "CLIP") if kind == "clip" else ("spiece.model", "SigLIP")
        raise ValueError(
            f"tokenizer.kind is {kind!r} but no tokenizer.json or {files} is named: set text.weights to a {model} "
            "folder, or set tokenizer.path"
        )
    if kind == "wordpiece":
        raise ValueError(
            "tokenizer.kind is 'wordpiece' but no vocab.txt is named: set text.weights to a BERT folder (or 'minilm'), "
            "set tokenizer.path, or use tokenizer.kind='sentencepiece', whose model lies in the data set"
        )
    folder = find_dataset(config.data.dir)
    check_files(folder, [SENTENCEPIECE])  # a changed bit may change the pieces and nothing else
    return folder / SENTENCEPIECE


def wordpiece(path: Path) -> Tokenizer:
    """BERT's tokenizer of a vocab.txt with the settings beside it, or of a tokenizer.json."""
    vocabulary = bert.read(path)
    return _with_roles(vocabulary, vocabulary.starts_word, vocabulary.ids, vocabulary.max_length)


def sentence_piece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model that has the pieces SPECIAL, [PAD] as id 0."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: SentencePiece model not found (data_prep trains one for every data set with captions)"
        )
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as error:
        raise DataError(f"{path}: expected a SentencePiece model (cut off?): {error}", file=path.name) from None
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    starts_word = np.array([piece.startswith("\u2581") for piece in pieces])
    return _with_roles(_SentencePiece(processor), starts_word, special_ids(path, ids, bert.ROLES))


def clip(path: Path) -> Tokenizer:
    """CLIP's tokenizer of a tokenizer.json, or of a merges.txt; it has no mask token."""
    bpe = clip_bpe.read(path)
    random_range = _longest_run([NO_MASK, bpe.begin_id, bpe.end_id], len(bpe.ends_word))
    ends = (bpe.begin_id, bpe.end_id)
    return Tokenizer(bpe, bpe.ends_word, NO_MASK, *ends, random_range, marks_ends=True, max_length=bpe.max_length)


def siglip(path: Path) -> Tokenizer:
    """SigLIP's tokenizer of a spiece.model, or SigLIP 2's of a tokenizer.json; it has no mask token and fills up."""
    vocabulary, roles = siglip_tokens.read(path)
    special = (NO_MASK, roles.end_id, roles.fill_id, roles.unknown_id)
    return Tokenizer(
        vocabulary,
        roles.begins_word,
        NO_MASK,
        NO_BEGIN,
        roles.end_id,
        _longest_run(special, len(roles.begins_word)),
        unknown_id=roles.unknown_id,
        fill_id=roles.fill_id,
        max_length=roles.max_length,
    )


def _with_roles(
    vocabulary: _Vocabulary, starts_word: np.ndarray, ids: Mapping[str, int], max_length: int | None = None
) -> Tokenizer:
    """The tokenizer of a vocabulary with BERT's special tokens. ids: of these, by role."""
    return Tokenizer(
        vocabulary,
        starts_word,
        mask_id=ids["mask_token"],
        begin_id=ids["cls_token"],
        end_id=ids["sep_token"],
        random_range=_longest_run(ids.values(), len(starts_word)),
        unknown_id=ids["unk_token"],
        max_length=max_length,
    )


def _longest_run(special: Iterable[int], vocab_size: int) -> tuple[int, int]:
    """The longest range first..last-1 of ids without a special one."""
    gaps = pairwise([*sorted(special), vocab_size])
    first, last = max(gaps, key=lambda gap: gap[1] - gap[0])
    return first + 1, last


class _NoTokens:
    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        raise ValueError("a text side of stored vectors has no tokens")


WITHOUT_TOKENS = Tokenizer(_NoTokens(), np.zeros(0, bool), NO_MASK, begin_id=0, end_id=0, random_range=(0, 0))
"""In place of a tokenizer where the text side is stored vectors and there is no vocabulary."""


class _SentencePiece:
    def __init__(self, processor: sentencepiece.SentencePieceProcessor):
        self._processor = processor

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int)
