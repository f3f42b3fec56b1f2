import hashlib
import shutil
from pathlib import Path

import pytest

from data_prep.extract.settings import Settings
from data_prep.schema import DataError

torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
transformers = pytest.importorskip("transformers", reason="needs the extra `extract`: make test-extract")
weights = pytest.importorskip("data_prep.extract.weights")
fields = pytest.importorskip("data_prep.extract.fields")
convolutional = pytest.importorskip("data_prep.extract.convolutional")


def test_other_weights_are_refused_before_they_are_loaded(made, tmp_path, monkeypatch, capsys):
    folder, _, models = made
    expected = hashlib.sha256((Path(models["clip"]) / "model.safetensors").read_bytes()).hexdigest()
    fields.Extractor(Settings(folder, "", models["clip"], backbone_sha256=expected.upper()), "cpu")
    fields.Extractor(Settings(folder, "", models["clip"]), "cpu")
    err = capsys.readouterr().err
    assert f"sha256 of its weights {expected}\n" in err and "Loading weights" not in err
    changed = shutil.copytree(models["clip"], tmp_path / "changed")
    with (changed / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", None)  # called, it would fail
    for what in ("backbone", "segmenter"):
        names = {"segmenter": "", "backbone": "", what: str(changed), f"{what}_sha256": expected}
        with pytest.raises(
            DataError, match=f"^{what} .*changed: sha256 of its weights: expected {expected} .*, found "
        ):
            fields.Extractor(Settings(images=folder, **names), "cpu")


def test_models_are_told_by_their_files(made, tmp_path):
    folder, _, models = made
    clip = shutil.copytree(models["clip"], tmp_path / "clip")
    before = fields.Extractor(Settings(folder, models["maskformer"], str(clip)), "cpu").models
    assert before[f"backbone {clip}: weights"] == hashlib.sha256((clip / "model.safetensors").read_bytes()).hexdigest()
    described = clip / "preprocessor_config.json"
    described.write_text(described.read_text() + "\n")
    after = fields.Extractor(Settings(folder, models["maskformer"], str(clip)), "cpu").models
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [f"backbone {clip}: preprocessor_config.json"]
    names = (f"segmenter {models['maskformer']}", f"backbone {clip}")
    assert set(before) == {
        f"{name}: {part}" for name in names for part in ("weights", "config.json", "preprocessor_config.json")
    }


def test_a_convolutional_network_is_told_by_its_weights():
    network = torch.nn.Conv2d(3, 4, 2)
    whole = convolutional.ConvNet(network, torch.device("cpu"), 8, [0] * 3, [1] * 3)
    before = whole.sha256()
    assert whole.sha256() == before
    with torch.no_grad():
        network.bias[0] += 1
    assert whole.sha256() != before


def test_shards_count_all(made, tmp_path):
    _, _, models = made
    whole = transformers.AutoModel.from_pretrained(models["dinov2"])
    whole.save_pretrained(tmp_path, max_shard_size="20kB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in shards)
    assert weights.digest(str(tmp_path)) == hashlib.sha256(lines.encode()).hexdigest()
    shards[-1].unlink()
    with pytest.raises(DataError, match=f"expected the shard {shards[-1].name} that its index names, found none"):
        weights.digest(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected weights, model\.safetensors or pytorch_model\.bin, found neither"):
        weights.digest(str(tmp_path / "empty"))
