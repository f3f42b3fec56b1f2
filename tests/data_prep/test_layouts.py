"""Where the channels, corners and columns of untrusted arrays are: the true value, or one error that names the flag."""

import numpy as np
import pytest

from data_prep import from_bottom_up, from_grid_feats, from_npy, from_scan, from_upsnet, verify
from data_prep.schema import DataError
from data_prep.sources import boxes, units
from tests.data_prep.example import cell, stored_records

RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------------ channels

CELLS = RNG.normal(size=(4, 6, 32)).astype(np.float32)  # [h, w, D]
UNITS = CELLS.reshape(24, 32)


@pytest.mark.parametrize(
    ("array", "layout"),
    [
        (np.moveaxis(CELLS, 2, 0), None),
        (np.moveaxis(CELLS, 2, 0)[None], None),
        (np.moveaxis(CELLS, 2, 0), "chw"),
        (CELLS, "hwc"),
        (CELLS[None], "hwc"),
        (UNITS, None),
        (UNITS[None], None),
        (UNITS[:, :, None, None], None),
        (UNITS[:, :, None], None),
        (UNITS, "hwc"),
        (UNITS.T, "chw"),
        (UNITS.T[None], "chw"),
    ],
)
def test_the_same_units_of_every_layout(array, layout):
    actual = units.as_units(array, "here", None, layout)
    np.testing.assert_array_equal(actual, UNITS)
    assert actual.flags.c_contiguous


@pytest.mark.parametrize("shape", [(2048, 1, 1), (1, 2048, 1, 1), (1, 1, 2048), (1, 1, 1, 2048)])
def test_one_pooled_vector_is_one_unit(shape):
    assert units.as_units(np.zeros(shape, np.int8), "here").shape == (1, 2048)


@pytest.mark.parametrize(
    "shape",
    [
        *((7, 7, 256), (1, 7, 7, 256), (14, 14, 2048), (7, 10, 768), (1, 19, 25, 2048), (2, 2, 8), (12, 16, 16)),
        *((256, 200, 304), (16, 16, 16), (100, 75, 64), (64, 100, 50)),  # either may be meant
        *((2048, 36), (1, 2048, 49), (768, 196), (512, 49), (1024, 256), (2048, 7, 1)),
    ],
)
def test_a_layout_that_is_not_clear_is_refused(shape):
    with pytest.raises(DataError, match=r"^here: expected .*--layout=hwc .*--layout=chw .*found \["):
        units.as_units(np.zeros(shape, np.int8), "here")
    for layout in units.LAYOUTS:
        units.as_units(np.zeros(shape, np.int8), "here", None, layout)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        *(((36, 2048), (36, 2048)), ((577, 384), (577, 384)), ((1369, 384), (1369, 384)), ((100, 64), (100, 64))),
        *(((2048, 19, 25), (475, 2048)), ((1, 2048, 7, 7), (49, 2048)), ((64, 56, 56), (3136, 64))),
        *(((4, 3), (4, 3)), ((3, 2, 4), (8, 3)), ((3, 5, 8), (40, 3))),  # by hand
    ],
)
def test_clear_layouts_need_no_flag(shape, found):
    assert units.as_units(np.zeros(shape, np.int8), "here").shape == found


def test_pooling_of_channels_last():
    actual = units.as_units(CELLS, "here", 2, "hwc")
    np.testing.assert_allclose(actual, CELLS.reshape(2, 2, 2, 3, 32).mean((1, 3)).reshape(4, 32), atol=1e-6)


@pytest.fixture
def src(tmp_path):
    (tmp_path / "val_ids.txt").write_text("1\n2\n")
    (tmp_path / "val_caps.txt").write_text("a dog\na cat\n")
    return [f"--src={tmp_path}", "--name=toy", f"--out={tmp_path / 'out'}", "--feature_dtype=float32"]


@pytest.mark.parametrize("importer", ["from_npy", "from_grid_feats", "from_scan"])
def test_every_importer_of_maps_has_the_flag(importer, tmp_path, src, capsys):
    arrays = np.stack([CELLS, CELLS + 1])
    if importer == "from_scan":
        np.save(tmp_path / "val_grids.npy", arrays)
        main, flags = from_scan.main, src
    else:
        for number, array in enumerate(arrays, 1):
            np.save(tmp_path / f"{number}.npy", array[None])
        main, flags = from_npy.main, [*src, f"--features={tmp_path}", "--as=grid"]
    if importer == "from_grid_feats":
        (tmp_path / "c.csv").write_text("image,caption,split\n1.jpg,a,val\n2.jpg,b,val\n")
        main, flags = from_grid_feats.main, [f"--grids={tmp_path}", f"--captions={tmp_path / 'c.csv'}", *src[1:]]
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert "looks like [h, w, D]; --layout=hwc says channels last" in error and ".npy" in error
    assert main([*flags, "--layout=hwc"]) == 0
    np.testing.assert_array_equal(
        [record["grid"] for record in stored_records(tmp_path / "out")], arrays.reshape(2, 24, 32)
    )


@pytest.mark.parametrize(("name", "field"), [("val_ims.npy", "regions"), ("val_grids.npy", "grid")])
def test_transposed_arrays_of_a_split(name, field, tmp_path, src, capsys):
    array = RNG.normal(size=(2, 64, 9)).astype(np.float32)
    np.save(tmp_path / name, array)
    assert from_scan.main([*src, "--on_bad_record=skip"]) == 1
    error = capsys.readouterr().err
    assert f"{name}: expected [units, D], this may be [D, units]; --layout=" in error and "found [64, 9]" in error
    assert from_scan.main([*src, "--layout=chw"]) == 0
    np.testing.assert_array_equal(
        [record[field] for record in stored_records(tmp_path / "out")], array.transpose(0, 2, 1)
    )


def test_a_flag_without_features_to_read(tmp_path, src, capsys):
    (tmp_path / "c.csv").write_text("image,caption,split\n1.jpg,a,val\n")
    flags = [f"--upsnet={tmp_path}", f"--captions={tmp_path / 'c.csv'}", *src[1:3], "--layout=hwc"]
    assert from_upsnet.main(flags) == 1
    assert "--layout belongs to --grids or --npz or --hdf5" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "noted"), [((1792, 7), True), ((64, 36), True), ((20, 64), False), ((20, 8), True)])
def test_verify_notes_a_width_that_no_features_have(shape, noted, tmp_path, src):
    np.save(tmp_path / "val_grids.npy", RNG.normal(size=(2, *shape)))
    assert from_scan.main([*src, "--layout=hwc"]) == 0
    notes = verify.verify(tmp_path / "out").notes
    assert any(f"field grid: {shape[0]} units of width {shape[1]}: were its axes" in note for note in notes) == noted


# --------------------------------------------------------------------------------------------------------------- boxes

SIZE = (200, 100)
SHARES = np.array([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0], [0.55, 0.1, 0.6, 0.2]])


def _xywh(corners):
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)


@pytest.mark.parametrize("form", boxes.FORMS[:-1])
def test_the_same_boxes_of_every_form(form):
    given = SHARES * np.tile(SIZE, 2) if form.startswith("pixels") else SHARES
    given = _xywh(given) if form.endswith("xywh") else given
    actual = boxes.shares(given.astype(np.float32), SIZE, form, "here")
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, SHARES, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "size", "form", "match"),
    [
        (SHARES, SIZE, "pixels", r"found none beyond 1; --boxes=shares"),
        (SHARES * 200, None, "shares", r"found \[.*\] as box 0; --boxes=pixels"),
        (_xywh(SHARES * 200), SIZE, "pixels", r"found box 2 the other way round; --boxes=pixels_xywh"),
        (SHARES * 200, SIZE, "pixels_xywh", r"expected boxes in pixels of an image of 200 x 100"),
        (SHARES.T * 200, SIZE, "pixels", r"expected boxes \[K, 4\], found \[4, 3\] \(--layout=chw"),
        (SHARES * 200, None, "pixels", r"--sizes=FILE gives it, --boxes=shares .*, --boxes=none"),
        (SHARES * np.nan, SIZE, "pixels", "expected finite boxes"),
        (SHARES * [[200, 100, 200, 104]], SIZE, "pixels", r"found \[0.0, 0.0, 200.0, 104.0\] as box 1"),
    ],
)
def test_boxes_of_another_form_are_refused(given, size, form, match):
    with pytest.raises(DataError, match=match):
        boxes.shares(given, size, form, "here")


def test_a_corner_may_be_a_pixel_outside():
    actual = boxes.shares(np.array([[-0.6, 0, 200.9, 100]]), SIZE, "pixels", "here")
    assert actual.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"images": [{"id": 42, "file_name": "x_1.jpg", "width": 200, "height": 100}]}'),
        ("a.json", '[{"image_id": 42, "width": 200, "height": 100}]'),
        ("a.json", '{"42": [200, 100]}'),
        ("a.json", '{"000042.jpg": {"width": 200, "height": 100}}'),
        ("a.csv", "image,height,width,split\n42.jpg,100,200,val\n42.jpg,100,200,val\n"),
        ("a.tsv", "\ufeffID\tW\tH\r\n42\t200\t100\r\n"),
    ],
)
def test_sizes_of_every_file(name, text, tmp_path):
    (tmp_path / name).write_text(text, newline="")
    sizes = boxes.Sizes(tmp_path / name)
    assert sizes.find("COCO_val2014_000000000042.jpg") == SIZE and sizes.find("43.jpg") is None


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.json", "[]", "found none"),
        ("a.json", "3", "found int"),
        ("a.json", '{"42": 3}', "found 3"),
        ("a.json", '[{"width": 1, "height": 2}]', "file_name, image_id or id"),
        ("a.json", '[{"id": 1, "height": 2}]', "keys width and height, found id, height"),
        ("a.json", '[{"id": 1, "height": 2, "width": 0}]', "image '1': expected whole pixels"),
        (
            "a.json",
            '[{"id": 1, "height": 2, "width": 3}, {"id": 1, "height": 3, "width": 2}]',
            r"\(3, 2\) and \(2, 3\)",
        ),
        ("a.csv", "image,w,h\n42,x,3\n", "found 'x' x '3'"),
        ("a.csv", "w,h\n1,3\n", "column image or id, found w, h"),
        ("b.csv", None, "no such file"),
    ],
)
def test_sizes_that_are_none(name, text, match, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=match):
        boxes.Sizes(tmp_path / name)


# ------------------------------------------------------------------------------------------- columns of bottom-up files


def _cells(image_id, features, text=str):
    return {
        **{"image_id": image_id, "image_w": "200", "image_h": "100", "num_boxes": "3"},
        **{"boxes": text(cell(np.float32(SHARES * np.tile(SIZE, 2)))), "features": text(cell(np.float32(features)))},
    }


@pytest.fixture
def read(tmp_path, run):
    """Imports lines of bottom-up attention; -> the records or None, and what is printed."""
    (tmp_path / "c.csv").write_text("image,caption,split\n007.jpg,a dog,val\n8.jpg,a cat,val\n")

    def read(text):
        (tmp_path / "a.tsv").write_bytes(text if isinstance(text, bytes) else text.encode())
        flags = [f"--bottom_up={tmp_path / 'a.tsv'}", f"--captions={tmp_path / 'c.csv'}", "--feature_dtype=float32"]
        return run(from_bottom_up.main, *flags)

    return read


FEATURES = {"7": np.full((3, 4), 7), "8": np.full((3, 4), 8)}
HEADERS = [
    ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"],
    ["image_id", "image_h", "image_w", "num_boxes", "boxes", "features"],
    ["features", "boxes", "num_boxes", "image_h", "image_w", "image_id"],
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", HEADERS)
def test_a_header_says_which_column_is_which(header, end, read):
    rows = [header, *([_cells(number, FEATURES[number])[name] for name in header] for number in "78")]
    text = end.join("\t".join(row) for row in rows)  # the last line has no end
    for record, number in zip(read("\ufeff" + text)[0], "78", strict=True):
        np.testing.assert_array_equal(record["regions"], FEATURES[number])
        np.testing.assert_allclose(record["boxes"], SHARES, atol=1e-6)


def test_each_header_of_files_in_a_row_counts(read):
    rows = []
    for header, number in zip(HEADERS[1:], "78", strict=True):
        rows += [header, [_cells(number, FEATURES[number])[name] for name in header]]
    records, _ = read("\n".join("\t".join(row) for row in rows) + "\n")
    np.testing.assert_allclose([record["boxes"] for record in records], [SHARES] * 2, atol=1e-6)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("id\tw\th\tn\tb\tf", "found the names 'id', 'w', 'h', 'n', 'b', 'f'; rename the columns"),
        ("image_id\timage_w\timage_h\tnum_boxes\tboxes\tpool5", "found the names 'pool5'"),
        ("image_id\timage_w\tnum_boxes\tboxes\tfeatures", "found not one column image_h or img_h"),
        ("image_id\timage_w\timage_h\timg_h\tnum_boxes\tboxes\tfeatures", "found not one column image_h or img_h"),
    ],
)
def test_a_header_that_is_not_known_is_refused_by_name(header, match, read):
    row = "\t".join(_cells("7", FEATURES["7"]).values())
    records, error = read(f"{header}\n{row}\n")
    assert records is None and match in error


def test_the_whole_one_of_two_lines_of_an_image(read):
    complete = ["\t".join(_cells(number, FEATURES[number]).values()) for number in "78"]
    later = "\t".join(_cells("8", FEATURES["7"]).values())
    records, error = read("\n".join([complete[0][:90], *complete, later]) + "\n")
    assert "2 images have more than one line, such as '7'; the first whole one of each is taken" in error
    assert "image '007.jpg': its line at byte 91 is taken, not the broken one" in error and "image '8.jpg'" not in error
    assert [record["regions"][0, 0] for record in records] == [7, 8]


def test_cells_as_python_writes_bytes(read):
    rows = ["\t".join(_cells(number, FEATURES[number], lambda cell: f"b'{cell}'").values()) for number in "78"]
    assert [record["regions"][0, 0] for record in read("\n".join(rows))[0]] == [7, 8]


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"PK\x03\x04\0", "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "git-LFS"),
    ],
)
def test_a_file_of_another_kind_is_named(start, what, read):
    records, error = read(start + b"\n")
    assert records is None and what in error
