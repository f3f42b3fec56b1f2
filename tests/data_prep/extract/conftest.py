import numpy as np
import pytest

from data_prep.extract import blocks, run
from tests.data_prep.extract import models as tiny_models


class Colours:
    """In place of the models: the mean colour of each photograph. `limit` photographs, then the power fails."""

    def __init__(self, limit=1000):
        self.seen, self.limit, self.models = [], limit, {"backbone none: weights": "a"}

    def __call__(self, photographs, names):
        if len(self.seen) + len(photographs) > self.limit:
            raise KeyboardInterrupt
        self.seen += names
        return [{"image_embedding": np.asarray(p).mean((0, 1)).astype(np.float32)} for p in photographs]


@pytest.fixture
def models(monkeypatch):
    """Puts Colours in place of the models and returns it; blocks of three photographs."""

    def use(limit=1000):
        colours = Colours(limit)
        monkeypatch.setattr(blocks, "SIZE", 3)
        monkeypatch.setattr(run, "load_extractor", lambda settings, device: colours)
        return colours

    return use


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder of photographs and tiny models: (folder, names of the photographs, kind -> folder of the model)."""
    torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
    transformers = pytest.importorskip("transformers", reason="needs the extra `extract`: make test-extract")
    folder = tmp_path_factory.mktemp("photographs")
    return folder, tiny_models.write_photographs(folder), tiny_models.write_models(folder, torch, transformers)
