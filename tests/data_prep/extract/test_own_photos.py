"""`shnet photos` with the vision tower of a tiny CLIP in PyTorch: words, and a photograph that finds itself."""

import json
import shutil
from pathlib import Path

import pytest

from shnet_jax import bundled
from shnet_jax.modes.photos import photos

pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
GOLDEN = Path(__file__).parents[2] / "golden" / "clip"


def test_photographs_are_searched(made, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder, names, _ = made
    model = tmp_path / "clip"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(GOLDEN / name, model)
    square = {"height": 32, "width": 32}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(model)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in names:
        shutil.copy(folder / name, mine)
    c = bundled.get_config("dual")
    c.parallel.devices = 1
    photo = str(mine / names[2])
    photos(c, tmp_path / "run", folder=str(mine), model=str(model), query="a cat", photo=photo, top_k=4)
    words, like = json.loads((tmp_path / "run" / "search.json").read_text())["results"]
    assert {hit["image_id"] for hit in words["hits"]} == {*names}
    assert like["hits"][0]["image_id"] == names[2] and like["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
