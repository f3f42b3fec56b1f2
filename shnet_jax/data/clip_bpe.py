"""CLIP's byte-level BPE (Radford et al., 2021) from the files of a local folder, by the `tokenizers` package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from shnet_jax.data import model_folder
from shnet_jax.data.model_folder import GENERIC, FolderVocabulary, added_tokens, below, read_lines, vocabulary_faults
from shnet_jax.untrusted import read_object

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos_token": BEGIN, "eos_token": END}
END_OF_WORD = "</w>"
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipBPE(FolderVocabulary):
    """A vocabulary (see `tokenise`). ends_word: [vocab_size] bool, pieces that end a word."""

    ends_word: np.ndarray
    begin_id: int
    end_id: int


def find_vocabulary(folder: Path) -> Path:
    """The file of a CLIP folder to read: tokenizer.json, else merges.txt. FileNotFoundError without either."""
    for name in ("tokenizer.json", "merges.txt"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder} has neither tokenizer.json nor merges.txt: the weights mean nothing without them{below(folder)}"
    )


def read(path: Path) -> ClipBPE:
    """The vocabulary of a tokenizer.json or of a merges.txt.

    The merges say all: the vocabulary is 256 bytes, the same at the end of a word, the merges in turn, begin and end. A
    vocab.json beside them must say the same.

    Raises FileNotFoundError for a missing file, ValueError for one that is none of CLIP's.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: CLIP vocabulary not found (tokenizer.json, or merges.txt)")
    of_json = path.suffix == ".json"
    classes = ("CLIPTokenizer", *GENERIC) if of_json else ("CLIPTokenizer",)
    settings = model_folder.read_settings(path.parent, classes, ROLES)
    tokenizer = _of_json(path) if of_json else _of_merges(path)
    ids = tokenizer.get_vocab()
    missing = [token for token in (BEGIN, END) if token not in ids]
    if missing or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"{path}: {len(ids)} pieces; expected consecutive ids and {BEGIN}, {END}, found no {missing}")
    model_folder.check_agreement(path, tokenizer, settings)
    _check_tokens(path, tokenizer, settings)
    ends = np.zeros(len(ids), bool)
    ends[[number for piece, number in ids.items() if piece.endswith(END_OF_WORD)]] = True
    return ClipBPE(tokenizer, settings.max_length(), ends, ids[BEGIN], ids[END])


def _check_tokens(path: Path, tokenizer: tokenizers.Tokenizer, settings: model_folder.Settings) -> None:
    """Raises ValueError where the settings in the folder, or a tokenizer.json itself, ask for other tokens."""
    ids = tokenizer.get_vocab()
    for role, token in settings.tokens.items():
        if token != ROLES[role]:
            raise ValueError(f"{settings.folder}: {role} is {token!r:.80} in the settings; CLIP's is {ROLES[role]}")
    if strange := [t["content"] for t in added_tokens(path, ids, settings) if t["content"] not in ids]:
        raise ValueError(f"{path} has no {strange[0]!r:.80}, an added token in the settings beside it")
    ends = model_folder.enclosing_tokens(path, tokenizer, "CLIP's")
    if ends not in (None, (BEGIN, END)):
        raise ValueError(f"{path}: its post_processor puts {ends} around a caption; expected {BEGIN} and {END}")


def _of_json(path: Path) -> tokenizers.Tokenizer:
    described = read_object(path)
    if not {"model", "pre_tokenizer"} <= described.keys():
        raise ValueError(f"{path}: expected a tokenizer.json with a model and a pre_tokenizer")
    tokenizer = model_folder.parse_tokenizer(path, described, "CLIP's")
    if not isinstance(tokenizer.model, models.BPE) or tokenizer.model.end_of_word_suffix != END_OF_WORD:
        raise ValueError(f"{path}: expected a BPE whose words end in {END_OF_WORD}, as CLIP's")
    return tokenizer


def _of_merges(path: Path) -> tokenizers.Tokenizer:
    lines = read_lines(path, "a merges.txt")
    # The vocabulary of the original code has its own name before the mark.
    merges = [tuple(line.split()) for line in lines[1 if "#version" in lines[0] else 0 :]]
    wrong = next((number for number, merge in enumerate(merges) if len(merge) != 2), None)
    if wrong is not None:
        raise ValueError(f"{path}: merge {wrong}: expected two pieces, found {' '.join(merges[wrong])!r}")
    alphabet = _byte_order()
    pieces = [
        *alphabet,
        *(piece + END_OF_WORD for piece in alphabet),
        *("".join(merge) for merge in merges),
        BEGIN,
        END,
    ]
    ids = {piece: number for number, piece in enumerate(pieces)}
    beside = path.with_name("vocab.json")
    if beside.is_file() and read_object(beside) != ids:
        raise ValueError(f"{beside} is not the vocabulary that {path.name} makes; a tokenizer.json is read as it is")
    with vocabulary_faults(path, "CLIP's"):
        model = models.BPE(ids, [(a, b) for a, b in merges], unk_token=END, end_of_word_suffix=END_OF_WORD)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _byte_order() -> list[str]:
    """The characters that stand for the bytes, in the order of CLIP's vocabulary: the printable ones come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
