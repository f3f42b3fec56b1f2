"""Checks of the record that every importer yields: one per image, a dict of NumPy values, as FIELDS describes it.

Required are `image_id`, `captions` and one of VISUAL_FIELDS; everything else is optional. All records of a data set
have the fields, shapes and dtypes of the first.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_prep.notes import note
from shnet_jax.data.errors import DataError
from shnet_jax.data.schema import (
    FEATURE_DTYPES,
    FIELDS,
    MAP_VOID,
    MASKS,
    PER_CAPTION,
    TEXT_FIELDS,
    VECTOR_DTYPES,
    VISUAL_FIELDS,
    dtype_of,
)

Record = dict[str, Any]
Signature = dict[str, tuple[tuple[int, ...], str]]

BOX_OVERSHOOT = 1e-3  # float16 rounding of a box that touches the border

_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of characters: controls, zero width, white space


def refuse(wrong: Any, where: object, expected: object, found: object) -> None:
    """Raises DataError "WHERE: expected EXPECTED, found FOUND" where something is wrong."""
    if wrong:
        raise DataError(f"{where}: expected {expected}, found {found}")


def _error(where: str, files: Mapping[str, str], field: str, expected: str, actual: str) -> DataError:
    place = f"{where}, {files[field]}" if field in files else where
    return DataError(
        f"{place}: field {field!r}: expected {expected}, found {actual}", file=files.get(field), field=field
    )


def as_field(name: str, value: Any, *, where: str, file: str | None = None, dtype: str | None = None) -> np.ndarray:
    """`value` as an array of the dtype that `name` is stored in, refusing a cast that changes what it says.

    Features are cast to `dtype` ("float16", ...) or, without one, stay as they are (float64 becomes float32).
    Raises DataError, naming `where` and `file`, when integers or booleans do not survive the cast, or a finite feature
    overflows.
    """
    files = {name: file} if file else {}
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" and array.dtype.name not in FEATURE_DTYPES:
        raise _error(where, files, name, "numbers", f"an array of {array.dtype}")
    spec = FIELDS[name]
    wanted = spec.dtypes[0]
    if {*spec.dtypes} == {*FEATURE_DTYPES}:
        as_given = array.dtype.name if array.dtype.name in FEATURE_DTYPES else "float32"
        wanted = as_given if spec.dtypes is VECTOR_DTYPES else dtype or as_given
    target = dtype_of(wanted)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(target, copy=False)
    if target == array.dtype:
        pass
    elif target.kind in "iub":
        if not np.array_equal(cast, array):
            actual = f"{array.min()}..{array.max()} {array.dtype}"
            raise _error(where, files, name, f"whole values that fit {wanted}", actual)
    elif not _finite(cast) and _finite(array):
        actual = f"magnitudes up to {np.abs(array).max():.6g}; --feature_dtype=float32 stores them"
        raise _error(where, files, name, f"values that fit {wanted}", actual)
    if name in ("regions", "grid"):
        if array.any() and not cast.any():
            actual = f"magnitudes below {np.abs(array).max():.6g}; --feature_dtype=float32 stores them"
            raise _error(where, files, name, f"values that fit {wanted}", actual)
        if array.dtype.kind in "iu" and array.dtype.itemsize == 1:
            note(f"{name} are {array.dtype}: stored as they are, without the scale that quantised numbers have", where)
    return cast


def _finite(array: Any) -> bool:
    return bool(np.isfinite(array.astype(np.float32) if array.dtype.name == "bfloat16" else array).all())


def num_classes(record: Mapping[str, Any]) -> int | None:
    """C of a record: length of `categories`, else of `seg_semantic`; None when it has neither."""
    for name in ("categories", "seg_semantic"):
        if name in record:
            return int(np.shape(record[name])[0])
    return None


def close_void(record: Record) -> Record:
    """The record with the label map's 255 (COCO's void) replaced by C, where C is known."""
    classes = num_classes(record)
    if "seg_map" not in record or classes is None or classes > MAP_VOID:
        return record
    seg_map = np.asarray(record["seg_map"])
    return record | {"seg_map": np.where(seg_map == MAP_VOID, np.uint8(classes), seg_map).astype(seg_map.dtype)}


def check_record(
    record: Mapping[str, Any], where: str, files: Mapping[str, str] | None = None, *, least_captions: int = 1
) -> None:
    """Check one record by itself.

    Args:
      record: what an importer yields.
      where: split, row and image, as the start of an error message.
      files: the file that each field came from, for the message; fields may be missing.
      least_captions: 0 for photographs that are only searched.

    Raises:
      DataError: naming place, file, field, what was expected and what was found.
    """
    files = files or {}
    _check_text(record, where, files, least_captions)
    sizes: dict[str, tuple[int, str]] = {PER_CAPTION: (len(record["captions"]), "captions")}
    for name in record:
        if name not in TEXT_FIELDS:
            _check_array(name, record[name], sizes, where, files)
    if not any(name in record for name in VISUAL_FIELDS):
        raise _error(where, files, "|".join(VISUAL_FIELDS), "at least one of these", f"only {sorted(record)}")
    _check_boxes(record, where, files)
    _check_relations(record, where, files)
    _check_labels(record, where, files)
    for masked, mask in (MASKS | {"caption_tokens": "caption_token_mask"}).items():
        if mask in record and masked not in record:
            raise _error(where, files, mask, f"the field {masked!r} that it masks", "none")
        if mask in record and not record[mask].any(axis=-1).all():
            raise _error(where, files, mask, "at least one valid unit", f"none of {record[mask].shape[-1]}")


def _check_text(record: Mapping[str, Any], where: str, files: Mapping[str, str], least_captions: int) -> None:
    for name in ("image_id", "captions"):
        if name not in record:
            raise _error(where, files, name, "this required field", f"only {sorted(record)}")
    image_id, captions = record["image_id"], record["captions"]
    if not is_text(image_id):
        raise _error(where, files, "image_id", "text that is not empty", repr(image_id))
    if not isinstance(captions, list) or len(captions) < least_captions:
        raise _error(where, files, "captions", f"a list of at least {least_captions} string", repr(captions))
    for number, caption in enumerate(captions):
        if not is_text(caption):
            raise _error(where, files, "captions", "text", f"{caption!r} as caption {number} of {len(captions)}")
    if "caption_ids" in record:
        ids = record["caption_ids"]
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.shape != (len(captions),):
            raise _error(where, files, "caption_ids", f"int64 [{len(captions)}], one a caption", _describe(ids))


def is_text(value: Any) -> bool:
    """Whether a value is a string with a visible character and a UTF-8 form (half of a surrogate pair has none)."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    if not value.isprintable() and all(unicodedata.category(c) in _INVISIBLE for c in value):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_array(
    name: str, value: Any, sizes: dict[str, tuple[int, str]], where: str, files: Mapping[str, str]
) -> None:
    if name not in FIELDS:
        raise _error(where, files, name, f"one of {[*TEXT_FIELDS, *FIELDS]}", "an unknown field")
    spec = FIELDS[name]
    expected = f"{' | '.join(spec.dtypes)} [{', '.join(spec.shape)}]"
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.name not in spec.dtypes:
        raise _error(where, files, name, expected, _describe(value))
    if value.ndim != len(spec.shape):
        raise _error(where, files, name, expected, _describe(value))
    for letter, size in zip(spec.shape, value.shape, strict=True):
        if letter.isdigit():
            agreed, by = int(letter), name
        else:
            agreed, by = sizes.setdefault(letter, (size, name))
        if size != agreed:
            origin = "" if by == name else f" with {letter} = {agreed} as in {by!r}"
            raise _error(where, files, name, expected + origin, _describe(value))
    if value.size == 0 and name != "relations":
        raise _error(where, files, name, expected + ", not empty", _describe(value))
    if spec.dtypes[0].startswith("float") and not _finite(value):
        wide = np.asarray(value, dtype=np.float32)
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(wide))[0])
        raise _error(where, files, name, "finite values", f"{wide[bad]} at {list(bad)}")


def _outside(name: str, values: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """Mask of the values beyond the bounds of a field that has both."""
    field = FIELDS[name]
    assert field.low is not None and field.high is not None
    return (values < field.low - slack) | (values > field.high + slack)


def _check_boxes(record: Mapping[str, Any], where: str, files: Mapping[str, str]) -> None:
    if "boxes" in record:
        boxes = record["boxes"]
        outside = _outside("boxes", boxes, BOX_OVERSHOOT)
        if outside.any():
            row = int(np.argwhere(outside)[0, 0])
            hint = " (in pixels? divide by the image's width and height)" if boxes[row].max() > 2 else ""
            raise _error(where, files, "boxes", "coordinates in 0..1", f"{boxes[row].tolist()} as box {row}{hint}")
        swapped = (boxes[:, :2] > boxes[:, 2:]).any(axis=1)
        if swapped.any():
            row = int(np.argmax(swapped))
            hint = " (are the last two width and height?)"
            raise _error(where, files, "boxes", "x1 <= x2 and y1 <= y2", f"{boxes[row].tolist()} as box {row}{hint}")


def _check_relations(record: Mapping[str, Any], where: str, files: Mapping[str, str]) -> None:
    if "relation_scores" in record:
        scores = np.asarray(record["relation_scores"], np.float32)
        outside = _outside("relation_scores", scores)
        if outside.any():
            i, j = (int(x) for x in np.argwhere(outside)[0])
            actual = f"{scores[i, j]} as that of regions {i} and {j}"
            raise _error(where, files, "relation_scores", "confidences in 0..1", actual)
    if "relations" in record:
        relations = record["relations"]
        count = next((len(record[name]) for name in ("regions", "boxes") if name in record), None)
        if count is None:
            raise _error(where, files, "relations", "regions or boxes that it relates", "neither")
        good = (relations >= 0).all(axis=1) & (relations[:, [0, 2]] < count).all(axis=1)
        bad = ~(good | (relations == -1).all(axis=1))
        if bad.any():
            row = int(np.argmax(bad))
            expected = f"box numbers in 0..{count - 1} and a predicate >= 0, or a row of -1"
            raise _error(where, files, "relations", expected, f"{relations[row].tolist()} in row {row}")


def check_predicates(
    record: Mapping[str, Any], names: Sequence[str] | None, where: str, files: Mapping[str, str] | None = None
) -> None:
    """Raises DataError when a relation has a predicate beyond those that the data set names."""
    if names is not None and "relations" in record:
        predicates = record["relations"][:, 1]
        if (predicates >= len(names)).any():
            raise _error(where, files or {}, "relations", f"predicates 0..{len(names) - 1}", f"{predicates.max()}")


def leaks(*splits: str) -> bool:
    """Whether an image may not be in all of `splits`: those for evaluation may overlap (COCO's test and testall)."""
    return any(split.startswith("train") for split in splits)


def split_flags(splits: Collection[str]) -> list[str]:
    """Flags for splits that are not called train, val and test, which training, evaluation and search expect.

    A name that starts with val or dev is taken for val, one that starts with test for test, else any that is left.
    """
    train = [split for split in splits if split.startswith("train")]
    others = [split for split in splits if split not in (*train, "val", "test")]
    flags = [f"--config.data.train_split={train[0]}"] if train and "train" not in splits else []
    selecting = ""
    if train and "val" not in splits and others:
        selecting = next((split for split in others if split.startswith(("val", "dev"))), others[0])
        others.remove(selecting)
        flags.append(f"--config.data.val_split={selecting}")
    if "test" not in splits and (others or selecting):
        last = next((split for split in others if split.startswith("test")), (*others, selecting)[0])
        flags += [f"--config.eval.split={last}", f"--config.search.split={last}"]
    return flags


def check_new(
    record: Mapping[str, Any],
    rows: Mapping[str, int],
    where: str,
    files: Mapping[str, str] | None = None,
    split: str = "",
) -> None:
    """Raises DataError when `rows` (image id -> row) of this split, or of `split`, has the image."""
    row = rows.get(record["image_id"])
    if row is not None:
        expected, of = ("an image of no other split", f" of split {split!r}") if split else ("a new id", "")
        raise _error(where, files or {}, "image_id", expected, f"that of row {row}{of}")


def _check_labels(record: Mapping[str, Any], where: str, files: Mapping[str, str]) -> None:
    classes = num_classes(record)
    if "seg_map" in record and classes is not None and record["seg_map"].max() > classes:
        expected = f"class ids 0..{classes - 1}, or {classes} for void"
        raise _error(where, files, "seg_map", expected, f"{int(record['seg_map'].max())}")
    for name, field in FIELDS.items():
        if name in record and field.low is not None and field.high is None and np.min(record[name]) < field.low:
            raise _error(where, files, name, f"values >= {field.low:g}", f"{np.min(record[name])}")


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r:.80}"


def signature(record: Mapping[str, Any]) -> Signature:
    """Shape and dtype of each field; texts, which differ from image to image, have the shape (), their number is -1."""
    fixed = {
        name: (tuple(-1 if size is None else size for size in _stored_shape(name, v)), v.dtype.name)
        for name, v in record.items()
        if name not in TEXT_FIELDS
    }
    return {n: ((), "text") for n in TEXT_FIELDS if n in record} | fixed


def _stored_shape(name: str, value: np.ndarray) -> tuple[int | None, ...]:
    """The shape of a field in every record, None for the number of captions."""
    letters = FIELDS[name].shape
    return tuple(None if c == PER_CAPTION else size for c, size in zip(letters, value.shape, strict=True))


def check_like(record: Mapping[str, Any], first: Signature, where: str, files: Mapping[str, str] | None = None) -> None:
    """Raises DataError unless the record has the fields, shapes and dtypes of the data set's first record."""
    actual = signature(record)
    if actual == first:
        return
    files = files or {}
    for name in [*first, *actual]:
        if name not in actual:
            raise _error(where, files, name, "this field, which the first record has", f"only {sorted(actual)}")
        if name not in first:
            raise _error(where, files, name, f"only the first record's fields {sorted(first)}", "this one too")
        if actual[name] != first[name]:
            (shape, dtype), (other, other_dtype) = first[name], actual[name]
            expected = f"{dtype} {list(shape)} as in the first record"
            pads = name in ("regions", "grid") and shape[1:] == other[1:]  # only the number of units differs
            hint = "; --max_regions, --max_cells or --max_units pads them" if pads else ""
            raise _error(where, files, name, expected, f"{other_dtype} {list(other)}{hint}")


def features(example: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """TFDS features of a data set from a record: raw bytes for tensors, packed bits for `categories`."""

    def tensor(shape: tuple[int | None, ...], dtype: Any, doc: str) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES, doc=doc)

    out: dict[str, Any] = {
        "image_id": tfds.features.Text(doc=TEXT_FIELDS["image_id"].doc),
        "captions": tfds.features.Sequence(tfds.features.Text(), doc=TEXT_FIELDS["captions"].doc),
    }
    if "caption_ids" in example:
        out["caption_ids"] = tensor((None,), np.int64, TEXT_FIELDS["caption_ids"].doc)
    for name, field in FIELDS.items():
        if name not in example:
            continue
        value = example[name]
        if name == "categories":
            out[name] = tensor((-(-value.size // 8),), np.uint8, field.doc + ", packed bits (numpy.packbits)")
        else:
            out[name] = tensor(_stored_shape(name, value), value.dtype, field.doc)
    return tfds.features.FeaturesDict(out)


def stored(record: Mapping[str, Any]) -> Record:
    """The record as it is written: categories packed, arrays contiguous."""
    out = dict(record)
    if "categories" in out:
        out["categories"] = np.packbits(out["categories"])
    return out
