"""Fields of images that come from outside a data set: refused or read as an import would."""

from pathlib import Path

import numpy as np
import pytest

from shnet_jax.data.fields import checked_fields
from shnet_jax.data.records import DataSet, Feature

SHAPES = {
    "regions": ((4, 6), "float16"), "region_mask": ((4,), "bool"), "seg_map": ((2, 2), "uint8"),
    "categories": ((5,), "bool"), "box_classes": ((4,), "int32"),
}  # fmt: skip
SET = DataSet(Path("set"), {}, {name: Feature(s, np.dtype(d)) for name, (s, d) in SHAPES.items()}, 5, {})
N = 3


def fields(**changes):
    found = {name: np.ones((N, *shape), dtype) for name, (shape, dtype) in SHAPES.items()}
    return found | changes


def test_what_is_as_in_the_data_set_comes_back():
    given = fields()
    found = checked_fields(given, tuple(SHAPES), SET)
    assert list(found) == list(SHAPES)
    for name, values in found.items():
        np.testing.assert_array_equal(values, given[name])
    assert list(checked_fields(given, ("regions",), SET)) == ["regions"]


def test_other_numbers_of_units_missing_masks_and_other_floats():
    found = checked_fields({"regions": np.ones((N, 9, 6), np.float64)}, ("regions", "region_mask"), SET)
    assert found["regions"].shape == (N, 9, 6) and "region_mask" not in found


def test_void_of_a_label_map_is_the_number_of_classes():
    given = np.array([[[0, 255], [5, 4]]], np.uint8)
    found = checked_fields({"seg_map": given}, ("seg_map",), SET)["seg_map"]
    assert found.tolist() == [[[0, 5], [5, 4]]] and found.dtype == np.uint8


def nan_in(image):
    values = np.ones((N, 4, 6), np.float32)
    values[image, 1, 2] = np.nan
    return values


def none_real(image):
    mask = np.ones((N, 4), bool)
    mask[image] = False
    return mask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": np.ones((N, 4, 7))}, r"regions: expected \[images, any, 6\] as in set, found \[3, 4, 7\]"),
        ({"regions": np.ones((N, 6))}, r"regions: expected \[images, any, 6\] as in set, found \[3, 6\]"),
        ({"categories": np.ones((N, 4), bool)}, r"categories: expected \[images, 5\] as in set, found \[3, 4\]"),
        ({"region_mask": np.ones((N, 4))}, "region_mask: expected bool as in set, found float64"),
        ({"region_mask": np.ones((N, 5), bool)}, "region_mask: expected 4 values an image, .* of regions, found 5"),
        ({"region_mask": none_real(1)}, "region_mask of image 1: expected at least one that is real, found none"),
        ({"regions": nan_in(2)}, "regions of image 2: expected finite numbers, found NaN or infinity"),
        ({"seg_map": np.full((N, 2, 2), 6, np.uint8)}, r"seg_map of image 0: expected classes up to 5 \(void\) or 255"),
        ({"seg_map": np.full((N, 2, 2), 257)}, "seg_map of image 0: expected classes up to 5"),
        ({"seg_map": np.full((N, 2, 2), -1)}, "seg_map of image 0: expected classes up to 5"),
        ({"regions": np.ones((2, 4, 6))}, "the model reads regions, .* found regions of 2, region_mask of 3"),
        ({"regions": np.float32(1)}, "found regions of no axis"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        checked_fields(fields(**changes), tuple(SHAPES), SET)
