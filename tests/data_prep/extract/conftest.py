import pytest

from tests.data_prep.extract import models


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder of photographs and tiny models: (folder, names of the photographs, kind -> folder of the model)."""
    torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
    transformers = pytest.importorskip("transformers", reason="needs the extra `extract`: make test-extract")
    folder = tmp_path_factory.mktemp("photographs")
    return folder, models.write_photographs(folder), models.write_models(folder, torch, transformers)
