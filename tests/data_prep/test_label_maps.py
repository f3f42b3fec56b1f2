import numpy as np
import pytest

from data_prep import coco_panoptic, label_maps
from data_prep.schema import DataError


def test_the_list_of_classes():
    assert coco_panoptic.CLASSES == len(set(coco_panoptic.NAMES)) == len(set(coco_panoptic.CATEGORY_IDS)) == 133
    assert list(coco_panoptic.CATEGORY_IDS) == sorted(coco_panoptic.CATEGORY_IDS)
    known = {
        1: (0, "person"),
        90: (79, "toothbrush"),
        92: (80, "banner"),
        187: (119, "sky-other-merged"),
        200: (132, "rug-merged"),
    }
    for category, (index, name) in known.items():
        assert coco_panoptic.CLASS_OF_ID[category] == index and coco_panoptic.NAMES[index] == name


def test_segment_ids_are_read_from_all_three_channels():
    colors = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [255, 255, 255]]], np.uint8)
    assert coco_panoptic.segment_ids(colors).tolist() == [[1, 256], [65536, 2**24 - 1]]


def test_a_label_map_of_segments():
    segments = np.array([[0, 7, 7], [70000, 7, 9]])
    labels = coco_panoptic.label_map(segments, {7: 17, 70000: 200, 9: 17, 8: 1}, "a.png")
    assert labels.dtype == np.uint8 and labels.tolist() == [[255, 15, 15], [132, 15, 15]]
    with pytest.raises(DataError, match=r"a\.png: .*found 9 without"):
        coco_panoptic.label_map(segments, {7: 17, 70000: 200}, "a.png")
    with pytest.raises(DataError, match=r"a\.png: segment 9: .*found 12"):
        coco_panoptic.label_map(segments, {7: 17, 70000: 200, 9: 12}, "a.png")


def test_upsnet_puts_stuff_first():
    labels = np.array([[0, 52, 53], [132, 255, 54]], np.uint8)
    assert coco_panoptic.from_stuff_first(labels, "").tolist() == [[80, 132, 0], [79, 255, 1]]
    with pytest.raises(DataError, match=r"b\.png: expected classes 0\.\.132.*found 133"):
        coco_panoptic.from_stuff_first(np.array([[133]], np.uint8), "b.png")


@pytest.mark.parametrize("shape", [(48, 64), (7, 7), (5, 100)])
def test_shares_are_the_adaptive_average_of_the_one_hot_map(shape):
    labels = np.random.default_rng(0).choice([0, 3, 132, 255], shape).astype(np.uint8)
    actual = label_maps.class_shares(labels, 133)
    for row in range(7):
        for column in range(7):
            top, bottom = int(np.floor(row * shape[0] / 7)), int(np.ceil((row + 1) * shape[0] / 7))
            left, right = int(np.floor(column * shape[1] / 7)), int(np.ceil((column + 1) * shape[1] / 7))
            cell = labels[top:bottom, left:right]
            expected = [(cell == c).mean(dtype=np.float64) for c in range(133)]
            np.testing.assert_allclose(actual[:, row, column], expected, rtol=1e-6)


def test_shrink_takes_the_pixel_at_the_centre_of_each_cell():
    labels = np.add.outer(10 * np.arange(6), np.arange(9)).astype(np.uint8)
    assert label_maps.shrink(labels, 3).tolist() == [[11, 14, 17], [31, 34, 37], [51, 54, 57]]
    assert label_maps.shrink(labels, 12).shape == (12, 12)  # a small map grows


def test_fields_of_a_map():
    labels = np.full((64, 64), 5, np.uint8)
    labels[:, 32:] = 255
    record = label_maps.fields(labels, 133)
    assert np.flatnonzero(record["categories"]).tolist() == [5]
    np.testing.assert_array_equal(record["seg_map"], labels)
    np.testing.assert_allclose(record["seg_semantic"][5, :, [0, 6]], [[1] * 7, [0] * 7])
