from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs import esa as esa_config
from data_prep.schema import DataError
from shnet_jax.interop import clip_weights
from shnet_jax.models.clip import build_vision

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
    ("kind", "size", "side"),
    [("clip", 32, 4), ("siglip", 32, 4), ("dinov2", 28, 2), ("dinov2_with_registers", 28, 2), ("dinov3", 32, 4)],
)
def test_tokens_and_vector_are_those_of_the_whole_photograph(made, kind, size, side):
    folder, names, models = made
    images = [Image.open(folder / name) for name in names]
    found = backbone.Backbone(models[kind], CPU)(images)
    model = transformers.AutoModel.from_pretrained(models[kind]).eval()
    described = models["dinov2"] if kind == "dinov3" else models[kind]  # the same colours; its own needs torchvision
    processor = transformers.AutoImageProcessor.from_pretrained(described, backend="pil")
    for image, (grid, vector) in zip(images, found, strict=True):
        with torch.no_grad():
            pixels = _pixels(image, size, processor)
            vision = model(pixels) if kind.startswith("dinov") else model.vision_model(pixels)
            expected = model.visual_projection(vision.pooler_output) if kind == "clip" else vision.pooler_output
        assert grid.shape == (side, side, 32)
        patches = vision.last_hidden_state[0, -side * side :].numpy()
        np.testing.assert_allclose(grid.reshape(side * side, -1), patches, atol=1e-4)
        np.testing.assert_allclose(vector, expected[0].numpy(), atol=1e-4)


def test_projected_tokens_are_those_of_the_vision_tower_that_reads_pictures(made):
    """The same numbers whether a record holds the tokens or the picture (docs/models.md)."""
    folder, names, models = made
    images = [Image.open(folder / name) for name in names]
    _, sizes = clip_weights.sizes(Path(models["clip"]))
    _, params = clip_weights.load_clip(Path(models["clip"]))
    config = esa_config.get_config()
    config.model.clip.update(sizes)
    tower = build_vision(config.model.clip, "float32")
    resample = transformers.AutoImageProcessor.from_pretrained(models["clip"], backend="pil").resample
    pixels = np.stack([np.asarray(image.resize((32, 32), resample)) for image in images])
    expected = np.asarray(jax.jit(partial(tower.apply, train=False))({"params": params}, pixels))
    found = backbone.Backbone(models["clip"], CPU, projected=True)(images)
    for states, (grid, vector) in zip(expected, found, strict=True):
        assert grid.shape == (4, 4, 16) == (4, 4, *vector.shape)
        np.testing.assert_allclose(grid.reshape(16, 16), states[1:], atol=1e-4)
        np.testing.assert_allclose(vector, states[0], atol=1e-4)


def test_only_a_clip_projects_tokens(made):
    with pytest.raises(DataError, match=r"--tokens=projected expects a CLIP, .*; this is siglip"):
        backbone.Backbone(made[2]["siglip"], CPU, projected=True)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov3"])
def test_a_larger_picture_gives_a_finer_grid(made, kind):
    folder, names, models = made
    ((grid, _),) = backbone.Backbone(models[kind], CPU, 56)([Image.open(folder / names[0])])
    side = 4 if kind == "dinov2" else 7
    assert grid.shape == (side, side, 32) and np.isfinite(grid).all()


def test_what_the_patches_do_not_divide(made):
    with pytest.raises(DataError, match="image_size 50: expected a multiple of 8"):
        backbone.Backbone(made[2]["clip"], CPU, 50)


def test_siglip_2_for_pictures_of_any_shape_is_refused(made):
    """Its fixed sizes, such as siglip2-base-patch16-224, are of the kind siglip."""
    with pytest.raises(DataError, match="expected a vision transformer with square patches, found no image_size"):
        backbone.Backbone(made[2]["siglip2"], CPU)


def test_models_without_patches_are_refused(made):
    with pytest.raises(DataError, match="expected a vision transformer with square patches"):
        backbone.Backbone(made[2]["mask2former"], CPU)
