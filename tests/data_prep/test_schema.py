from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from data_prep import schema
from data_prep.schema import DataError
from shnet_jax.data.schema import FIELDS, MASKS, SIZES, VISUAL_FIELDS, batch_lines, markdown_table
from tests.data_prep.example import record


def _with(name, index, value):
    array = record()[name].copy()
    array[index] = value
    return {name: array}


def test_a_valid_record_passes():
    schema.check_record(record(), "row 0")


@pytest.mark.parametrize("visual", schema.VISUAL_FIELDS)
def test_one_visual_field_is_enough(visual):
    full = record()
    schema.check_record({name: full[name] for name in ("image_id", "captions", visual)}, "row 0")


@pytest.mark.parametrize(
    ("changes", "field", "expected", "found"),
    [
        ({"image_id": ""}, "image_id", "not empty", "''"),
        ({"image_id": None}, "image_id", "required", "captions"),
        ({"captions": [], "caption_ids": None}, "captions", "at least 1", "[]"),
        ({"captions": ["a", " "]}, "captions", "text", "caption 1 of 2"),
        ({"captions": ["a", "half \ud83d"]}, "captions", "text", r"'half \ud83d' as caption 1 of 2"),
        ({"captions": ["a", "\u200b\ufeff"]}, "captions", "text", r"'\u200b\ufeff' as caption 1 of 2"),
        ({"captions": ["a", "b\0"]}, "captions", "text", r"'b\x00' as caption 1 of 2"),
        ({"caption_ids": np.arange(3)}, "caption_ids", "int64 [2]", "int64 [3]"),
        ({"regions": np.zeros((4, 6))}, "regions", "float16 | bfloat16 | float32 [K, D]", "float64 [4, 6]"),
        ({"regions": [[1.0]]}, "regions", "float16", "list"),
        ({"regions": np.zeros((0, 6), np.float16), "region_mask": None}, "regions", "not empty", "[0, 6]"),
        ({"boxes": np.zeros((3, 4), np.float32)}, "boxes", "K = 4 as in 'regions'", "[3, 4]"),
        ({"boxes": np.zeros((4, 5), np.float32)}, "boxes", "float32 [K, 4]", "[4, 5]"),
        ({"grid": np.zeros((1, 3, 5), np.float16)}, "grid", "[G, Dg]", "[1, 3, 5]"),
        ({"relation_scores": np.zeros((4, 3), np.float16)}, "relation_scores", "[K, K] with K = 4", "[4, 3]"),
        ({"relation_scores": np.full((4, 4), 2, np.float16)}, "relation_scores", "0..1", "2.0 as that of regions 0"),
        ({"grid": None}, "grid_mask", "'grid'", "none"),
        ({"categories": np.zeros(12, bool)}, "categories", "C = 11 as in 'seg_semantic'", "bool [12]"),
        ({"region_mask": np.zeros(4, bool)}, "region_mask", "at least one valid", "none of 4"),
        ({"colour": np.zeros(3)}, "colour", "one of", "unknown"),
        (
            {"caption_embeddings": np.zeros((3, 7), np.float32)},
            "caption_embeddings",
            "float32 | float16 | bfloat16 [n, F] with n = 2 as in 'captions'",
            "[3, 7]",
        ),
        (
            {"caption_token_mask": np.ones((2, 6), bool)},
            "caption_token_mask",
            "bool [n, L] with L = 5 as in 'caption_tokens'",
            "[2, 6]",
        ),
        ({"caption_token_mask": np.eye(2, 5, -1) > 0}, "caption_token_mask", "at least one valid", "none of 5"),
        (_with("regions", (1, 2), np.nan), "regions", "finite", "nan at [1, 2]"),
        (_with("grid", (2, 0), np.inf), "grid", "finite", "inf at [2, 0]"),
        (_with("boxes", 2, [0, 0, 1.01, 1]), "boxes", "0..1", "box 2"),
        (_with("boxes", 1, [0.5, 0, 0.4, 1]), "boxes", "x1 <= x2", "box 1"),
        (_with("seg_map", (0, 0), 12), "seg_map", "0..10, or 11 for void", "12"),
        (_with("box_classes", 0, -1), "box_classes", ">= 0", "-1"),
        (_with("relations", 0, [0, 1, 4]), "relations", "0..3", "[0, 1, 4]"),
        (_with("relations", 1, [-1, 0, -1]), "relations", "row of -1", "row 1"),
    ],
)
def test_an_error_names_place_field_expected_and_found(changes, field, expected, found):
    with pytest.raises(DataError) as caught:
        schema.check_record(record(**changes), "split 'x' row 7", {field: "some.npy"})
    message = str(caught.value)
    assert message.startswith(f"split 'x' row 7, some.npy: field {field!r}: expected ")
    before, after = message.split(", found ", 1)
    assert expected in before
    assert found in after


def test_no_visual_field_is_an_error():
    with pytest.raises(DataError, match="expected at least one of these"):
        schema.check_record({"image_id": "a", "captions": ["a"], "identity": np.int64(1)}, "row 0")


def test_a_box_may_overshoot_by_float16_rounding():
    schema.check_record(record(**_with("boxes", 0, [-0.0005, 0, 1.0005, 1])), "row 0")


def test_bfloat16_is_checked_for_nan():
    regions = record()["regions"].astype(ml_dtypes.bfloat16)
    schema.check_record(record(regions=regions), "row 0")
    regions[0, 0] = np.nan
    with pytest.raises(DataError, match="finite"):
        schema.check_record(record(regions=regions), "row 0")


def test_void_255_becomes_class_c():
    seg_map = np.array([[3, 255]], np.uint8)
    assert schema.close_void(record(seg_map=seg_map))["seg_map"].tolist() == [[3, 11]]
    no_classes = record(seg_map=seg_map, seg_semantic=None, categories=None)
    assert schema.close_void(no_classes)["seg_map"].tolist() == [[3, 255]]


def test_as_field_casts_without_loss():
    assert schema.as_field("categories", np.array([0.0, 1.0]), where="").dtype == bool
    assert schema.as_field("seg_map", np.array([[132, 255]]), where="").dtype == np.uint8
    assert schema.as_field("regions", np.zeros((1, 2)), where="").dtype == np.float32
    assert schema.as_field("regions", np.zeros((1, 2), np.float16), where="").dtype == np.float16
    assert schema.as_field("regions", np.zeros((1, 2)), where="", dtype="bfloat16").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("field", "value", "dtype"),
    [
        ("seg_map", np.array([[256]]), None),
        ("seg_map", np.array([[-1]]), None),
        ("categories", np.array([0, 2]), None),
        ("box_classes", np.array([0.5]), None),
        ("regions", np.array([[1e6]]), "float16"),
        ("regions", np.array([["x"]]), None),
    ],
)
def test_as_field_refuses_a_cast_that_changes_values(field, value, dtype):
    with pytest.raises(DataError, match=f"here: field '{field}'"):
        schema.as_field(field, value, where="here", dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": np.zeros((4, 5), np.float16), "grid_mask": None}, "'grid': expected float16 \\[3, 5\\]"),
        ({"regions": np.zeros((4, 6), np.float32)}, "'regions': expected float16"),
        ({"identity": None}, "'identity': expected this field"),
    ],
)
def test_records_must_be_like_the_first(changes, message):
    first = schema.signature(record(count=1))
    schema.check_like(record(1, count=3), first, "row 1")
    with pytest.raises(DataError, match=message):
        schema.check_like(record(1, **changes), first, "row 1")


def test_a_field_that_the_first_record_lacks():
    first = schema.signature(record(identity=None))
    with pytest.raises(DataError, match="'identity': expected only the first record's fields"):
        schema.check_like(record(), first, "row 1")


def test_what_is_made_of_the_schema_is_up_to_date():
    """The table in docs/data.md and the fields of a batch in types.py are copies of what `data.schema` prints."""
    root = Path(schema.__file__).parents[1]
    assert f"\n\n{markdown_table()}\n\n" in (root / "docs" / "data.md").read_text("utf-8")
    assert f"\n{batch_lines()}\n" in (root / "shnet_jax" / "types.py").read_text("utf-8")
    letters = {axis for field in FIELDS.values() for axis in field.shape if not axis.isdigit()}
    assert letters == {letter for names in SIZES for letter in names.split(", ")}
    assert {*VISUAL_FIELDS, *MASKS, *MASKS.values()} <= {*FIELDS}
