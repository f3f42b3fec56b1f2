import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_prep import from_scan
from data_prep.schema import DataError
from shnet_jax.data.records import find_dataset, open_dataset
from shnet_jax.observe import progress
from tests.data_prep.example import altered, line, put

IMAGES, PER = 5, 5


def _arrays(images, rng):
    corners = np.sort(rng.random((images, 4, 2, 2)), axis=2).reshape(images, 4, 4)
    seg_maps = rng.integers(0, 11, (images, 6, 6))
    seg_maps[:, 0, 0] = 255
    return {
        "ims": rng.normal(size=(images, 4, 3)).astype(np.float32),
        "boxes": corners.astype(np.float16),
        "box_cls": rng.integers(0, 80, (images, 4)).astype(np.uint8),
        "box_scores": rng.random((images, 4)).astype(np.float16),
        "grids": rng.normal(size=(images, 9, 2)).astype(np.float16),
        "segmentations": rng.random((images, 11, 2, 2)).astype(np.float32),
        "seg_maps": seg_maps,
        "cat_onehots": (rng.random((images, 11)) < 0.4).astype(np.float64),
        "relations": rng.integers(0, 4, (images, 2, 3)),
        "relation_scores": rng.random((images, 4, 4)).astype(np.float32),
        "image_emb": rng.normal(size=(images, 5)).astype(np.float32),
    }


@pytest.fixture
def src(tmp_path):
    """A folder of two splits, one row an image; `write` makes other forms."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "src"
    folder.mkdir()
    for split in ("train", "dev"):
        for name, array in _arrays(IMAGES, rng).items():
            np.save(folder / f"{split}_{name}.npy", array)
        _lines(folder / f"{split}_caps.txt", [f"caption {i} of a {split} image" for i in range(IMAGES * PER)])
        _lines(folder / f"{split}_ids.txt", [f"{split}{i}.jpg" for i in range(IMAGES)])
    _lines(folder / "categories.txt", [f"{i}\tname {i}\tthing" for i in range(11)] + ["11\tvoid\tvoid"])
    return folder


def _lines(path: Path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _written(name, lines):
    return lambda src: _lines(src / name, lines)


def _load(src, split):
    return {name: np.load(src / f"{split}_{name}.npy") for name in _arrays(1, np.random.default_rng())}


def _only(src, *names):
    for path in src.glob("*.npy"):
        if path.stem.partition("_")[2] not in names:
            path.unlink()


def _first(src, out, **options):
    return open_dataset(from_scan.import_scan(src, "toy", out, **options))


def test_all_arrays_arrive_in_their_fields(src, tmp_path):
    dataset = _first(src, tmp_path / "out", feature_dtype=None)
    assert dataset.splits == {"dev": IMAGES, "train": IMAGES}
    assert dataset.metadata["class_names"] == [f"name {i}" for i in range(11)]
    assert dataset.num_classes == 11
    arrays = _load(src, "dev")
    for i, record in enumerate(dataset.open_split("dev", list(dataset.features))):
        assert record["image_id"] == f"dev{i}.jpg"
        assert record["captions"] == [f"caption {PER * i + k} of a dev image" for k in range(PER)]
        for field, suffix in from_scan.ARRAYS.items():
            expected = arrays[suffix.removeprefix("_").removesuffix(".npy")][i]
            expected = np.where(expected == 255, 11, expected) if field == "seg_map" else expected
            np.testing.assert_array_equal(record[field], expected, err_msg=field)


def test_embeddings_and_numbers_of_captions(src, tmp_path):
    vectors = np.random.default_rng(1).normal(size=(IMAGES * PER, 5))
    numbers = [7 * k + 1 for k in range(IMAGES * PER)]
    for split in ("train", "dev"):
        np.save(src / f"{split}_caption_emb.npy", vectors)
        _lines(src / f"{split}_capids.txt", map(str, numbers))
    dataset = _first(src, tmp_path / "out")
    assert dataset.features["caption_embeddings"].shape == (None, 5)
    records = list(dataset.open_split("dev", ("caption_embeddings", "caption_ids")))
    np.testing.assert_array_equal(np.concatenate([r["caption_embeddings"] for r in records]), vectors.astype("f4"))
    assert np.concatenate([r["caption_ids"] for r in records]).tolist() == numbers


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_vectors_in_safetensors_are_those_of_npy(dtype, src, tmp_path):
    vectors = np.random.default_rng(1).normal(size=(IMAGES * PER, 5)).astype(dtype)
    for split in ("train", "dev"):
        save_file({"vectors": vectors}, src / f"{split}_caption_emb.safetensors")
        images = np.load(src / f"{split}_image_emb.npy")
        save_file({"any name": images}, src / f"{split}_image_emb.safetensors")
        (src / f"{split}_image_emb.npy").unlink()
    dataset = _first(src, tmp_path / "out")
    assert dataset.features["caption_embeddings"].dtype == dtype
    records = list(dataset.open_split("dev", ("caption_embeddings", "image_embedding")))
    np.testing.assert_array_equal(np.concatenate([r["caption_embeddings"] for r in records]), vectors)
    np.testing.assert_array_equal(np.stack([r["image_embedding"] for r in records]), images)


def test_safetensors_that_do_not_fit(src, tmp_path):
    path = src / "dev_caption_emb.safetensors"

    def refused(match):
        with pytest.raises(DataError, match=match):
            from_scan.import_scan(src, "toy", tmp_path / "out")

    good = {"a": np.ones((IMAGES * PER, 5), np.float32)}
    save_file(good | {"b": np.ones(2, np.float32)}, path)
    refused(r"dev_caption_emb\.safetensors: expected one tensor, found a, b")
    save_file({"a": np.ones((4, 5), np.float32)}, path)
    refused(r"dev_caption_emb\.safetensors: expected \[25, F\], a row a caption, found \[4, 5\]")
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(r"'a' of shape \(25, 5\) does not fit into the file; was it copied whole")
    save_file(good, path)
    np.save(path.with_suffix(".npy"), good["a"])
    refused(r"expected one file of these vectors, found dev_caption_emb\.npy beside it; remove one of the two")


@pytest.mark.parametrize(
    ("lines", "shape", "message"),
    [
        (["1"] * 24, (25, 5), r"dev_capids\.txt: expected 25 lines, one a caption, found 24"),
        (
            ["1"] * 24 + ["x"],
            (25, 5),
            r"dev_capids\.txt line 25: expected a whole number of at most 18 digits, found 'x'",
        ),
        (["1"] * 24 + ["9" * 20], (25, 5), r"dev_capids\.txt line 25: expected a whole number of at most 18 digits"),
        (["1"] * 25, (5, 5), r"dev_caption_emb\.npy: expected \[25, F\], a row a caption, found \[5, 5\]"),
    ],
)
def test_files_of_captions_that_do_not_fit(lines, shape, message, src, tmp_path):
    _lines(src / "dev_capids.txt", lines)
    np.save(src / "dev_caption_emb.npy", np.ones(shape))
    with pytest.raises(DataError, match=message):
        from_scan.import_scan(src, "toy", tmp_path / "out")


def test_features_are_stored_in_float16_unless_kept(src, tmp_path):
    assert _first(src, tmp_path / "a").features["regions"].dtype == np.float16
    assert _first(src, tmp_path / "b", feature_dtype=None).features["regions"].dtype == np.float32


@pytest.mark.parametrize("ids", ["one an image", "one a caption", "none"])
@pytest.mark.parametrize("repeated", [True, False])
def test_rows_repeated_for_each_caption(src, tmp_path, ids, repeated):
    _only(src, "ims", "cat_onehots")
    names = [f"dev{i}.jpg" for i in range(IMAGES)]
    images = np.load(src / "dev_ims.npy")
    if repeated:
        np.save(src / "dev_ims.npy", images.repeat(PER, axis=0))
    if ids == "none":
        names = [f"dev_{i}" for i in range(IMAGES)]
        (src / "dev_ids.txt").unlink()
    elif ids == "one a caption":
        _lines(src / "dev_ids.txt", [name for name in names for _ in range(PER)])
    dataset = _first(src, tmp_path / "out", splits=["dev"], feature_dtype=None)
    records = list(dataset.open_split("dev", ["regions", "image_id", "captions"]))
    assert [record["image_id"] for record in records] == names
    np.testing.assert_array_equal([record["regions"] for record in records], images)
    assert records[1]["captions"][0] == f"caption {PER} of a dev image"


def test_only_repeated_rows_and_no_ids(src, tmp_path):
    _only(src, "ims")
    (src / "dev_ids.txt").unlink()
    np.save(src / "dev_ims.npy", np.load(src / "dev_ims.npy").repeat(PER, axis=0))
    assert _first(src, tmp_path / "out", splits=["dev"]).splits == {"dev": IMAGES}


@pytest.mark.parametrize("per_image", [1, 2])
def test_other_numbers_of_captions(src, tmp_path, per_image):
    _lines(src / "dev_caps.txt", [f"text {i}" for i in range(IMAGES * per_image)])
    (src / "dev_ids.txt").unlink()
    dataset = _first(src, tmp_path / "out", splits=["dev"], captions_per_image=per_image)
    assert dataset.caption_counts("dev").tolist() == [per_image] * IMAGES


def test_five_different_rows_are_not_five_captions_of_one_image(src, tmp_path):
    _lines(src / "dev_caps.txt", [f"text {i}" for i in range(IMAGES)])
    (src / "dev_ids.txt").unlink()
    with pytest.raises(DataError, match=r"dev_ims\.npy: .*rows 0\.\.4 differ .*--captions_per_image=1"):
        from_scan.import_scan(src, "toy", tmp_path, splits=["dev"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            put("dev_ims.npy", np.nan, 3, 1, 2),
            r"row 3 \(image 'dev3\.jpg'\), dev_ims\.npy: field 'regions': expected finite .*nan at \[1, 2\]",
        ),
        (
            altered("dev_ims.npy", lambda a: a * 1e6),
            r"row 0 .*dev_ims\.npy: field 'regions': expected values that fit float16",
        ),
        (
            altered("dev_grids.npy", lambda a: a[:4]),
            r"split 'dev': expected as many captions for each image, found 25 for 4 images",
        ),
        (line("dev_caps.txt", 7, b""), r"dev_caps\.txt line 7: expected text, found an empty line"),
        (line("dev_caps.txt", 7, b"a caf\xe9"), r"line 7: expected visible UTF-8 text, found 'a caf\\udce9'"),
        (_written("dev_caps.txt", ["a dog"] * (IMAGES * PER - 1)), r"24 for 5 images"),
        (
            put("dev_seg_maps.npy", 12, 2, 1, 1),
            r"row 2 .*dev_seg_maps\.npy: field 'seg_map': expected class ids 0\.\.10, or 11 .*found 12",
        ),
        (
            altered("dev_cat_onehots.npy", lambda a: a * 0.5),
            r"dev_cat_onehots\.npy: field 'categories': expected whole values",
        ),
        (
            altered("dev_ims.npy", lambda a: np.array([{"regions": 1}] * IMAGES, object)),
            r"dev_ims\.npy: expected a \.npy array of numbers",
        ),
        (
            _written("dev_ids.txt", ["a", "b", "a", "c", "d"]),
            r"row 2 \(image 'a'\), dev_ids\.txt: field 'image_id': expected a new id, found that of row 0",
        ),
        (
            _written("dev_ids.txt", [f"dev{i // PER if i != 7 else 'x'}" for i in range(IMAGES * PER)]),
            r"dev_ids\.txt line 8: expected 'dev1' as in the lines before, found 'devx'",
        ),
        (_written("categories.txt", ["cat", "dog"]), r"categories\.txt: expected 11 classes"),
    ],
)
def test_an_error_names_file_row_and_field(src, tmp_path, spoil, message):
    spoil(src)
    with pytest.raises(DataError, match=message):
        from_scan.import_scan(src, "toy", tmp_path / "out", splits=["dev"])
    assert not list((tmp_path / "out").glob("toy/*"))


@pytest.mark.parametrize("rows", [(), (0, 36, 4)])
def test_files_without_a_row(rows, src, tmp_path):
    np.save(src / "dev_ims.npy", np.ones(rows))
    with pytest.raises(DataError, match=r"dev_ims\.npy: expected a row for each image, found shape \["):
        from_scan.import_scan(src, "toy", tmp_path / "out", splits=["dev"])
    (src / "dev_caps.txt").write_text("")
    with pytest.raises(DataError, match=r"dev_caps\.txt: expected a caption a line, found none"):
        from_scan.import_scan(src, "toy", tmp_path / "out", splits=["dev"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "utf-32"])
def test_text_files_as_programs_end_and_encode_them(encoding, src, tmp_path):
    for name in ("dev_caps.txt", "dev_ids.txt"):
        text = (src / name).read_text(encoding="utf-8")
        (src / name).write_bytes((text.replace("\n", "\r\n") + "\n \n\n").encode(encoding))
    dataset = _first(src, tmp_path / "out", splits=["dev"])
    assert dataset.splits == {"dev": IMAGES} and "\0" not in next(dataset.captions("dev"))[0]


def test_the_mark_that_windows_writes_is_no_part_of_a_caption(src, tmp_path):
    for name in ("dev_caps.txt", "dev_ids.txt"):
        (src / name).write_bytes(b"\xef\xbb\xbf" + (src / name).read_bytes())
    path = from_scan.import_scan(src, "toy", tmp_path / "out", splits=["dev"])
    dataset = open_dataset(path)
    assert "\ufeff" not in dataset.image_ids("dev")[0] + next(dataset.captions("dev"))[0]


@pytest.mark.parametrize("flag", ["--max_regions=3", "--pool_grids=2", "--max_cells=9", "--panoptic_png=x"])
def test_a_flag_that_belongs_to_another_is_not_ignored(flag, src, tmp_path, capsys):
    assert from_scan.main([f"--src={src}", "--name=toy", f"--out={tmp_path / 'out'}", flag]) == 1
    assert f"{flag.split('=')[0]} belongs to --" in capsys.readouterr().err


def test_missing_files_are_named(src, tmp_path):
    with pytest.raises(DataError, match=r"val_caps\.txt: expected this file"):
        from_scan.import_scan(src, "toy", tmp_path, splits=["val"])
    _only(src)
    with pytest.raises(DataError, match=r"split 'dev': expected dev_ims\.npy or another array"):
        from_scan.import_scan(src, "toy", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        from_scan.import_scan(src / "absent", "toy", tmp_path)


def test_command_line(src, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    flags = [
        f"--src={src}",
        "--name=toy",
        f"--out={tmp_path / 'out'}",
        "--splits=train,dev",
        "--feature_dtype=bfloat16",
    ]
    assert from_scan.main(flags) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(find_dataset(tmp_path / "out"))
    assert printed.err.startswith("toy: 1/10 (10%)  ") and "toy: 10/10 (100%)  " in printed.err
    assert from_scan.main(flags) == 1
    assert "exists" in capsys.readouterr().err
    assert from_scan.main([*flags, "--overwrite", "--source=by hand"]) == 0
    assert open_dataset(tmp_path / "out").metadata["source"] == "by hand"


_PEAK = """
import json, sys
from pathlib import Path
from data_prep import from_scan
# not ru_maxrss, which begins with that of the process that started this one
peak = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
src = Path(sys.argv[1])
first = next(records := iter(from_scan.open_split(src, "dev", feature_dtype="float16")))
before, rows = peak(), 1 + sum(1 for _ in records)
print(json.dumps({"rows": rows, "growth": peak() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_memory_does_not_grow_with_the_file(tmp_path):
    images = 1500
    shape = (images * PER, 16, 256)  # 117 MiB, a hole in the file that takes no disk
    array = np.lib.format.open_memmap(tmp_path / "dev_ims.npy", mode="w+", dtype=np.float32, shape=shape)
    size = array.nbytes
    del array
    _lines(tmp_path / "dev_caps.txt", ["a dog"] * images * PER)
    run = [sys.executable, "-c", _PEAK, str(tmp_path)]
    root = Path(from_scan.__file__).parent.parent
    out = json.loads(subprocess.run(run, check=True, capture_output=True, text=True, cwd=root).stdout)
    assert out["rows"] == images
    assert out["growth"] < size / 10


@pytest.mark.parametrize(("per_image", "images"), [(4, 5), (4, 6), (6, 5), (10, 3), (3, 1), (1, 6)])
def test_captions_of_an_image_are_found_from_repeated_rows(tmp_path, per_image, images):
    """Not taken for 5: 4 times 5 rows, and 10 of each image, are multiples of it."""
    rows = np.arange(images, dtype=np.float32)
    np.save(tmp_path / "x_ims.npy", rows.repeat(per_image)[:, None, None] + np.zeros((1, 2, 3), np.float32))
    _lines(tmp_path / "x_caps.txt", [f"text {i}" for i in range(images * per_image)])
    split = from_scan.open_split(tmp_path, "x")
    assert (split.captions_per_image, len(split)) == (per_image, images)
    assert [record["regions"][0, 0] for record in split] == rows.tolist()


def test_neighbours_with_equal_rows_do_not_mislead(tmp_path):
    rows = np.array([0, 0, 1, 2, 2, 2, 3], np.float32)  # 1, 2 and 5, 6 look alike
    np.save(tmp_path / "x_ims.npy", rows.repeat(4)[:, None, None])
    _lines(tmp_path / "x_caps.txt", [f"text {i}" for i in range(28)])
    assert from_scan.open_split(tmp_path, "x").captions_per_image == 4


def test_rows_that_say_nothing_are_told(tmp_path, capsys):
    np.save(tmp_path / "x_ims.npy", np.zeros((100, 1, 2), np.float32))
    _lines(tmp_path / "x_caps.txt", [f"text {i}" for i in range(100)])
    assert from_scan.open_split(tmp_path, "x").captions_per_image == 5
    assert "x_ims.npy: its rows are all equal; 5 captions an image are assumed" in capsys.readouterr().err
    np.save(tmp_path / "x_ims.npy", np.repeat(np.arange(2), [6, 10])[:, None].astype(np.float32))
    _lines(tmp_path / "x_caps.txt", [f"text {i}" for i in range(16)])
    with pytest.raises(DataError, match=r"x_ims\.npy: .* found runs of 6, 10 equal rows among 16; give"):
        from_scan.open_split(tmp_path, "x")
