import numpy as np
import pytest
from PIL import Image

from data_prep.schema import DataError

torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
transformers = pytest.importorskip("transformers", reason="needs the extra `extract`: make test-extract")
backbone = pytest.importorskip("data_prep.extract.backbone")
CPU = torch.device("cpu")


def _pixels(image, size, processor):
    """The whole photograph squashed to a square, scaled as the processor says."""
    squashed = np.asarray(image.resize((size, size), processor.resample), np.float32) / 255
    scaled = (squashed - processor.image_mean) / processor.image_std
    return torch.tensor(scaled.transpose(2, 0, 1)[None], dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "size", "side"), [("clip", 32, 4), ("siglip", 32, 4), ("dinov2", 28, 2), ("dinov2_with_registers", 28, 2)]
)
def test_tokens_and_vector_are_those_of_the_whole_photograph(made, kind, size, side):
    folder, names, models = made
    images = [Image.open(folder / name) for name in names]
    found = backbone.Backbone(models[kind], CPU)(images)
    model = transformers.AutoModel.from_pretrained(models[kind]).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(models[kind], backend="pil")
    for image, (grid, vector) in zip(images, found, strict=True):
        with torch.no_grad():
            pixels = _pixels(image, size, processor)
            vision = model(pixels) if kind.startswith("dinov2") else model.vision_model(pixels)
            expected = model.visual_projection(vision.pooler_output) if kind == "clip" else vision.pooler_output
        assert grid.shape == (side, side, 32)
        patches = vision.last_hidden_state[0, -side * side :].numpy()
        np.testing.assert_allclose(grid.reshape(side * side, -1), patches, atol=1e-4)
        np.testing.assert_allclose(vector, expected[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_a_larger_picture_gives_a_finer_grid(made, kind):
    folder, names, models = made
    ((grid, _),) = backbone.Backbone(models[kind], CPU, 56)([Image.open(folder / names[0])])
    side = 4 if kind == "dinov2" else 7
    assert grid.shape == (side, side, 32) and np.isfinite(grid).all()


def test_what_the_patches_do_not_divide(made):
    with pytest.raises(DataError, match="image_size 50: expected a multiple of 8"):
        backbone.Backbone(made[2]["clip"], CPU, 50)


def test_models_without_patches_are_refused(made):
    with pytest.raises(DataError, match="expected a vision transformer with square patches"):
        backbone.Backbone(made[2]["mask2former"], CPU)
