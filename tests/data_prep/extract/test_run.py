"""The steps of an extraction with a stand-in for the models: none of it needs PyTorch."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from data_prep import encode_captions
from data_prep.extract import __main__ as command
from data_prep.extract import images, run
from shnet_jax.data.records import open_dataset
from tests.data_prep.extract.conftest import Colours
from tests.interop.test_sentence_vectors import bert


@pytest.fixture
def flags(tmp_path):
    """Ten photographs, one of them cut off and one missing; flags that extract them."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    cat = Image.fromarray(skimage.data.chelsea()).resize((60, 40))
    rows = ["image,caption,split"]
    for number in range(10):
        path = folder / f"{number}.jpg"
        rows += [f"{number}.jpg,a cat {number},{'val' if number == 9 else 'train'}"]
        if number != 4:
            cat.rotate(90 * number).point(lambda value, n=number: value * (n + 1) // 10).save(path)
    path = folder / "2.jpg"
    path.write_bytes(path.read_bytes()[:600])
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    return [
        f"--images={folder}",
        f"--captions={tmp_path / 'captions.csv'}",
        f"--out={tmp_path / 'sets'}",
        "--name=cats",
        "--backbone=none",
        "--batch_size=2",
    ]


def test_broken_photographs_are_named_and_left_out(tmp_path, flags, models, capsys):
    models()
    assert command.main(flags) == 0
    err = capsys.readouterr().err
    assert "2.jpg: " in err and "4.jpg: no such file" in err
    assert "left out 2 photographs that cannot be read: 2.jpg, 4.jpg\n" in err
    dataset = open_dataset(tmp_path / "sets")
    assert dataset.metadata["skipped"] == ["2.jpg", "4.jpg"]
    stored = {
        record["image_id"]: record
        for split in ("train", "val")
        for record in dataset.open_split(split, ["image_id", "captions", "image_embedding"])
    }
    assert list(stored) == [f"{n}.jpg" for n in (0, 1, 3, 5, 6, 7, 8, 9)]
    for name, record in stored.items():
        assert record["captions"] == [f"a cat {name[0]}"]
        expected = np.asarray(Image.open(tmp_path / "photographs" / name)).mean((0, 1))
        np.testing.assert_allclose(record["image_embedding"], expected, rtol=1e-5)
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["cats"]  # the blocks are gone


def test_photographs_without_captions_are_a_set_to_search(tmp_path, flags, models, capsys):
    models()
    (tmp_path / "photographs" / "more").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "photographs" / "more" / "red.png")
    (tmp_path / "photographs" / ".trash.jpg").write_bytes(b"")
    (tmp_path / "photographs" / "notes.txt").write_text("nothing")
    alone = [flag for flag in flags if not flag.startswith("--captions")]
    assert command.main(alone) == 0
    err = capsys.readouterr().err
    assert "left out 1 photographs that cannot be read: 2.jpg\n" in err
    dataset = open_dataset(tmp_path / "sets")
    assert dataset.splits == {"photos": 9}
    assert dataset.image_ids("photos").tolist() == [f"{n}.jpg" for n in (0, 1, 3, 5, 6, 7, 8, 9)] + ["red.png"]
    records = dataset.open_split("photos", ["captions", "image_embedding"])
    assert [record["captions"] for record in records] == [[]] * 9
    np.testing.assert_allclose(records[8]["image_embedding"], [255, 0, 0])
    models()
    assert command.main([*alone, "--split=mine", "--name=again"]) == 0
    assert open_dataset(tmp_path / "sets" / "again").splits == {"mine": 9}


def test_a_folder_without_photographs(tmp_path, flags, capsys):
    (tmp_path / "empty").mkdir()
    assert command.main([flag for flag in flags if "--captions" not in flag] + [f"--images={tmp_path / 'empty'}"]) == 1
    assert "expected photographs (.jpg, .jpeg, .png, " in capsys.readouterr().err


def test_a_stopped_run_goes_on(tmp_path, flags, models, capsys):
    first = models(limit=5)
    assert command.main(flags) == 130
    assert len(first.seen) > 2 and not (tmp_path / "sets" / "cats").exists()
    assert capsys.readouterr().err.endswith(
        "extract: 6 of 10 photographs are done; the same command goes on\ninterrupted\n"
    )
    second = models()
    assert command.main(flags) == 0
    assert "going on after 6 of 10 photographs" in capsys.readouterr().err
    assert [name.rpartition("/")[2] for name in second.seen] == ["6.jpg", "7.jpg", "8.jpg", "9.jpg"]
    assert open_dataset(tmp_path / "sets").splits == {"train": 7, "val": 1}


def test_other_settings_do_not_mix_with_what_was_begun(flags, models, capsys):
    models(limit=5)
    assert command.main(flags) == 130
    assert command.main([*flags, "--image_size=14"]) == 1
    assert "an extraction with image_size = None was begun here, now it is 14" in capsys.readouterr().err


def test_other_weights_do_not_mix_with_what_was_begun(tmp_path, flags, models, capsys):
    """Weights of the same name may be replaced between two runs: half of the features would be of each."""
    models(limit=5)
    assert command.main(flags) == 130
    other = models()
    other.models = {"backbone none: weights": "b"}
    capsys.readouterr()
    assert command.main(flags) == 1 and not other.seen
    folder = tmp_path / "sets" / ".cats.extract"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {folder}: begun with another backbone none: weights: sha256: expected a, found b; put that file back, "
        f"or begin anew: rm -r {folder}"
    )
    other.models = {"backbone none: weights": "a", "backbone none: preprocessor_config.json": "c"}
    assert command.main(flags) == 1 and not other.seen
    assert "preprocessor_config.json: sha256: expected no such file, found c; " in capsys.readouterr().err
    models()
    assert command.main(flags) == 0


def test_blocks_of_different_models_are_no_data_set(tmp_path, flags, models, monkeypatch, capsys):
    """Machines that work on one extraction may have other weights under one name."""

    class Another(Colours):
        def __call__(self, photographs, names):
            if len(self.seen) > 3:
                self.models = {"backbone none: weights": "b"}
            return super().__call__(photographs, names)

    models()
    monkeypatch.setattr(run, "load_extractor", lambda settings, device: Another())
    assert command.main(flags) == 1
    assert "begun with another backbone none: weights: sha256: expected a, found b; " in capsys.readouterr().err
    assert not (tmp_path / "sets" / "cats").exists()


def test_blocks_of_a_version_that_noted_no_models(tmp_path, flags, models, capsys):
    """They are taken where all are done, and not gone on with."""
    models(limit=5)
    assert command.main(flags) == 130
    for path in (tmp_path / "sets" / ".cats.extract").glob("*.npz"):
        with np.load(path) as arrays:
            fields = {name: arrays[name] for name in arrays.files if name != "models"}
        np.savez(path, **fields)
    models()
    assert command.main(flags) == 1
    assert "begun with another backbone none: weights: sha256: expected no such file" in capsys.readouterr().err


def test_a_broken_photograph_may_be_an_error(flags, models, capsys):
    models()
    assert command.main([*flags, "--broken=fail"]) == 1
    assert "2.jpg: " in capsys.readouterr().err


def test_an_existing_set_is_kept(tmp_path, flags, models, capsys):
    models()
    assert command.main(flags) == 0
    again = models()
    assert command.main(flags) == 1 and not again.seen
    assert "cats/1.0.0 exists" in capsys.readouterr().err
    assert command.main([*flags, "--overwrite"]) == 0 and len(again.seen) == 8


def test_flags_that_cannot_work(flags, capsys):
    assert command.main([flag for flag in flags if not flag.startswith("--backbone")]) == 1
    assert "expected --segmenter, --backbone or both" in capsys.readouterr().err
    assert command.main([*flags, "--images=/absent"]) == 1
    assert "/absent: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["backbone", "segmenter"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "somebody/model",
            "not here, and not to be had (the hub does not answer); fetch it on a machine with a network "
            "(hf download somebody/model --local-dir=FOLDER) and give --{what}=FOLDER",
        ),
        ("./absent", "no such folder"),
    ],
)
def test_a_model_that_is_not_here_is_one_line(flags, monkeypatch, capsys, what, name, message):
    hub = pytest.importorskip("data_prep.extract.hub", reason="needs the extra `extract`: make test-extract")

    def nothing(*args, **kwargs):
        raise OSError("not in\nthe cache")

    monkeypatch.setattr(hub, "snapshot_download", nothing)
    monkeypatch.setattr(hub, "_answers", lambda: False)
    flags = [flag for flag in flags if not flag.startswith("--backbone")]
    assert command.main([*flags, f"--{what}={name}"]) == 1
    assert capsys.readouterr().err == f"error: --{what}={name}: {message.format(what=what)}\n"


def test_photographs_are_found_upright_and_in_colour(tmp_path):
    gray = Image.new("L", (30, 20), 100)
    exif = gray.getexif()
    exif[0x0112] = 6  # turned by a quarter
    gray.save(tmp_path / "a.jpg", exif=exif)
    folder = images.Folder(tmp_path)
    assert folder.place("val2014/a.jpg") == str(tmp_path / "a.jpg")
    loaded = folder.load("val2014/a.jpg")
    assert loaded.mode == "RGB" and loaded.size == (20, 30)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_changed_byte_in_what_the_camera_wrote(tmp_path):
    picture, path = Image.new("RGB", (30, 20)), tmp_path / "a.jpg"
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    data = bytearray(path.read_bytes())
    tag = data.index(b"\x01\x12")  # then its type, 16-bit number
    assert data[tag + 2 : tag + 4] == b"\x00\x03"
    for kind in range(256):  # whatever it becomes, a picture or an error that names the file
        data[tag + 3] = kind
        path.write_bytes(data)
        try:
            assert images.Folder(tmp_path).load("a.jpg").mode == "RGB"
        except images.BrokenImage as error:
            assert str(path) in str(error)


def test_captions_are_encoded_in_the_same_run(tmp_path, flags, models, capsys):
    models()
    assert command.main([*flags, f"--text_encoder={bert(tmp_path / 'bert')}", "--text_dtype=float32"]) == 0
    assert "mean pooling, sha256 of its weights" in capsys.readouterr().err
    dataset = open_dataset(tmp_path / "sets")
    assert dataset.metadata["text_encoder"]["pooling"] == "mean" and dataset.metadata["skipped"] == ["2.jpg", "4.jpg"]
    records = list(dataset.open_split("val", ("image_id", "image_embedding", "caption_embeddings")))
    assert [(r["image_id"], r["image_embedding"].shape, r["caption_embeddings"].shape) for r in records] == [
        ("9.jpg", (3,), (1, 8))
    ]
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["cats"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_run_killed_while_captions_are_encoded_goes_on_with_the_same_command(
    tmp_path, flags, models, monkeypatch, capsys, overwrite
):
    models()
    flags = [*flags, f"--text_encoder={bert(tmp_path / 'bert')}", *overwrite]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_captions, "_encode_split", killed)
        assert command.main(flags) == 130
    assert "text_encoder" not in open_dataset(tmp_path / "sets" / "cats").metadata
    models(limit=0)  # no photograph is looked at again
    assert command.main(flags) == 0
    assert "going on with its captions" in capsys.readouterr().err
    assert "text_encoder" in open_dataset(tmp_path / "sets" / "cats").metadata
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["cats"]
    if not overwrite:
        assert command.main(flags) == 1
        assert "exists; give another --name, or --overwrite" in capsys.readouterr().err
