"""The segmenter with the true processors and models; where segments must be known, the model's answer is put in."""

import numpy as np
import pytest
from PIL import Image

from data_prep import coco_panoptic
from data_prep.schema import DataError

torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
segment = pytest.importorskip("data_prep.extract.segment")

DOG, SKY, PERSON = (coco_panoptic.NAMES.index(name) for name in ("dog", "sky-other-merged", "person"))


def _segmenter(folder, seg_map="panoptic", regions=4):
    return segment.Segmenter(folder, torch.device("cpu"), regions=regions, region_score=0.3, seg_map=seg_map)


def _images(made):
    folder, names, _ = made
    return [Image.open(folder / name) for name in names]


def _answer(segmenter, kind, labels, sure=12.0):
    """Makes the model say: sky above, a dog below left, perhaps a person below right, and six times nothing."""
    logits = torch.zeros(1, 10, len(labels) + 1)
    logits[:, :, -1] = sure
    for query, (index, score) in enumerate([(DOG, sure), (SKY, sure), (PERSON, 0.0)]):
        logits[0, query, labels.index(index)] = score + 8
        logits[0, query, -1] = 8 if query == 2 else 0  # the person is a coin toss
    masks = torch.full((1, 10, 16, 32), -sure)
    masks[0, 0, 8:, :16] = masks[0, 1, :8] = masks[0, 2, 8:, 24:] = sure
    model = type(segmenter._model)
    true = segmenter._model
    assert model.__name__.lower().startswith(kind)

    def forward(pixel_values):
        outputs = true(pixel_values=pixel_values)  # the container of the true model, with other numbers
        shape = (len(pixel_values), 1, 1)
        if kind == "detr":
            outputs.logits, outputs.pred_masks = logits.repeat(shape), masks.repeat(*shape, 1)
        else:
            outputs.class_queries_logits, outputs.masks_queries_logits = logits.repeat(shape), masks.repeat(*shape, 1)
        return outputs

    segmenter._model = forward


@pytest.mark.parametrize("kind", ["mask2former", "maskformer", "detr"])
def test_known_segments(made, kind):
    segmenter = _segmenter(made[2][kind])
    # DETR's labels are COCO's category ids; a label without a class takes no part
    labels = [coco_panoptic.CLASS_OF_ID.get(n, -1 - n) for n in range(250)] if kind == "detr" else list(range(133))
    _answer(segmenter, kind, labels)
    for image in (Image.new("RGB", (96, 48)), Image.new("RGB", (192, 96))):
        (record,) = segmenter([image])
        expected = np.full((64, 64), 255)
        expected[:32], expected[32:, :32] = SKY, DOG
        np.testing.assert_array_equal(record["seg_map"], expected)
        assert np.flatnonzero(record["categories"]).tolist() == [DOG, SKY]  # the person is below the threshold
        assert sorted(record["box_classes"].tolist()) == sorted([DOG, SKY, PERSON])
        assert record["box_classes"][-1] == PERSON and 0.4 < record["box_scores"][-1] < 0.5
        boxes = dict(zip(record["box_classes"].tolist(), record["boxes"].tolist(), strict=True))
        np.testing.assert_allclose(boxes[SKY], [0, 0, 1, 0.5])
        np.testing.assert_allclose(boxes[DOG], [0, 0.5, 0.5, 1])
        np.testing.assert_allclose(boxes[PERSON], [0.75, 0.5, 1, 1])
        np.testing.assert_allclose(record["seg_semantic"].sum(0), 1, rtol=1e-5)
        np.testing.assert_allclose(record["seg_semantic"][SKY, :3], 1, atol=0.02)
        np.testing.assert_allclose(record["seg_semantic"][DOG, 4:, :3], 1, atol=0.02)


def test_the_likeliest_class_everywhere(made):
    segmenter = _segmenter(made[2]["mask2former"], seg_map="semantic")
    _answer(segmenter, "mask2former", list(range(133)))
    (record,) = segmenter([Image.new("RGB", (96, 48))])
    assert (record["seg_map"][32:, 48:] == PERSON).all() and (record["seg_map"] < 133).all()


@pytest.mark.parametrize("kind", ["mask2former", "detr"])
@pytest.mark.parametrize("seg_map", ["panoptic", "semantic"])
def test_no_result_depends_on_the_other_photographs(made, kind, seg_map):
    segmenter = _segmenter(made[2][kind], seg_map)
    images = _images(made)
    together = segmenter(images)
    assert len({image.size for image in images}) > 1
    for image, record in zip(images, together, strict=True):
        (alone,) = segmenter([image])
        assert record.keys() == alone.keys()
        for name, value in alone.items():
            if np.issubdtype(value.dtype, np.floating):
                np.testing.assert_allclose(record[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
        assert (record["seg_map"] == alone["seg_map"]).mean() > 0.95  # queries of random weights are nearly ties
        assert 1 <= len(record["boxes"]) <= 4 and record["seg_semantic"].shape == (133, 7, 7)


def test_a_query_that_others_hide_is_left_out():
    classes = torch.zeros(3, 133)
    classes[0, DOG], classes[1, SKY], classes[2, PERSON] = 0.99, 0.9, 0.95
    masks = torch.full((3, 10, 10), -9.0)
    masks[0, :5] = masks[1, 3:] = masks[2, 0:1, 0:1] = 9.0  # the dog hides 2 of the sky's 7 rows, and the person
    labels = segment.panoptic_labels(classes, masks)
    assert labels.unique().tolist() == [DOG, 255] and (labels[:5] == DOG).all()
    masks[1, 3:4] = -9.0  # now 1 of 6
    assert (segment.panoptic_labels(classes, masks)[5:] == SKY).all()


def test_models_of_other_classes_are_refused():
    names = dict(enumerate(coco_panoptic.NAMES))
    assert segment.classes_of_labels(names, "").tolist() == list(range(133))
    swapped = names | {0: "bicycle", 1: "person"}
    assert segment.classes_of_labels(swapped, "")[:3].tolist() == [1, 0, 2]
    mixed = {n: "N/A" if n < 1 else f"LABEL_{n}" for n in range(250)} | {1: "person"}
    classes = segment.classes_of_labels(mixed, "")
    assert classes[0] == -1 and classes[1] == 0 and classes[200] == 132 and classes[201] == -1
    with pytest.raises(DataError, match=r"segmenter x: expected the 133 classes .*150 labels, found 133 missing"):
        segment.classes_of_labels({n: f"ade {n}" for n in range(150)}, "x")


def test_probabilities_of_labels_of_one_class_add_up():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.5]])
    expected = np.exp([1, 2, 3, 0.5]) / np.exp([1, 2, 3, 0.5]).sum()
    probabilities = segment.class_probabilities(logits, np.array([7, -1, 7]))[0].numpy()
    np.testing.assert_allclose(probabilities[7], expected[0] + expected[2], rtol=1e-6)
    assert np.count_nonzero(probabilities) == 1


@pytest.mark.parametrize(
    ("scores", "seen", "most", "chosen"),
    [
        ([0.2, 0.9, 0.5, 0.5], [True] * 4, 3, [1, 2, 3]),
        ([0.2, 0.9, 0.5, 0.4], [True, False, True, True], 1, [2]),
        ([0.2, 0.1], [False, True], 2, [1]),  # always one
        ([0.1, 0.2], [False, False], 2, [1]),
    ],
)
def test_the_choice_of_regions(scores, seen, most, chosen):
    assert segment.choose(np.array(scores), np.array(seen), most, 0.3) == chosen
