import numpy as np

from data_prep.extract.pool import box_average, boxes_of_masks


def test_boxes_of_masks():
    masks = np.zeros((3, 4, 8), bool)
    masks[0, 0, 0] = masks[1, 1, 2] = masks[1, 3, 6] = True
    expected = [[0, 0, 1 / 8, 1 / 4], [2 / 8, 1 / 4, 7 / 8, 1], [0, 0, 1, 1]]  # nothing to see: the whole image
    np.testing.assert_allclose(boxes_of_masks(masks), expected)
    assert boxes_of_masks(masks).dtype == np.float32


def test_box_average_is_the_integral_over_the_box():
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(3, 5, 4))
    boxes = np.sort(rng.random((20, 2, 2)), 1).reshape(20, 4)
    fine = 2000  # sample points an axis
    at = (np.arange(fine) + 0.5) / fine
    for box, average in zip(boxes, box_average(grid, boxes), strict=True):
        rows = at[(at > box[1]) & (at < box[3])]
        columns = at[(at > box[0]) & (at < box[2])]
        weights_y = np.bincount((rows * 3).astype(int), minlength=3) / len(rows)
        weights_x = np.bincount((columns * 5).astype(int), minlength=5) / len(columns)
        np.testing.assert_allclose(average, np.einsum("h,w,hwd->d", weights_y, weights_x, grid), atol=0.02)


def test_boxes_at_the_border_and_without_area():
    grid = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    boxes = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0.4, 0.1, 0.5, 0.2], [1 / 3, 0, 1, 0.5]], np.float32)
    np.testing.assert_allclose(box_average(grid, boxes)[:, 0], [2.5, 5, 0, 1, 1.5], atol=1e-3)
