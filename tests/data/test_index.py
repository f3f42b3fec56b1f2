import mmap

import numpy as np
import pytest

from shnet_jax.data.index import IndexBuilder, read_index, write_index

IMAGES = [("a", ["a dog", "zwei Hunde – ДВА"]), ("b", ["line\nbreak\x00 "]), ("ünï", ["", "犬", ""]), ("d", ["end"])]


def _index(images=IMAGES, folder=None):
    index = IndexBuilder(folder)
    for image_id, captions in images:
        index.add(image_id, captions)
    return index.build()


def test_ids_and_captions_come_back(tmp_path):
    write_index(tmp_path, "x", _index())
    read = read_index(tmp_path, "x")
    assert len(read) == 4
    assert read.image_ids.tolist() == [image_id for image_id, _ in IMAGES]
    assert read.caption_counts.tolist() == [2, 1, 3, 1] and read.caption_counts.dtype == np.int32
    assert list(read.all_captions()) == [captions for _, captions in IMAGES]
    assert [read.captions(row) for row in (3, 0, 2)] == [IMAGES[row][1] for row in (3, 0, 2)]


def test_the_text_may_lie_in_a_file_meanwhile(tmp_path):
    for images in (IMAGES, [("a", [""])]):
        (tmp_path / "meanwhile").mkdir(exist_ok=True)
        found = _index(images, tmp_path / "meanwhile")
        assert list(found.all_captions()) == [captions for _, captions in images]
        assert isinstance(found.text, mmap.mmap) == (images is IMAGES)
        write_index(tmp_path, "file", found)
        write_index(tmp_path, "memory", _index(images))
        assert (tmp_path / "index_file.npz").read_bytes() == (tmp_path / "index_memory.npz").read_bytes()
        assert not list((tmp_path / "meanwhile").iterdir())


def test_no_file_and_a_file_without_captions_are_no_index(tmp_path):
    assert read_index(tmp_path, "x") is None
    np.savez(tmp_path / "index_x.npz", image_ids=np.array(["a"]), caption_counts=np.array([2], np.int32))
    assert read_index(tmp_path, "x") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_counts": [2, 1, 3]}, "expected as many caption_counts as image_ids, found 3 and 4"),
        ({"identities": [1, 2]}, "expected as many identities as image_ids, found 2 and 4"),
        ({"caption_counts": [2, 1, 3, 2]}, "expected 8 captions .*found 7"),
        ({"caption_ends": [5, 4, 6, 6, 7, 7, 8]}, r"expected 7 captions that end in order .*found 7: \[5, 4, 6\]"),
        ({"caption_ends": [1, 2, 3, 4, 5, 6, 9999]}, r"within \d+ bytes, found 7: \[1, 2, 3\] \.\.\. \[9999\]"),
        ({"caption_ends": [-1, 2, 3, 4, 5, 6, 7]}, r"found 7: \[-1, 2, 3\]"),
        ({"image_ids": np.array(["a", None], object)}, "expected an index as data_prep writes it: .*Python objects"),
        ({"caption_ends": None}, "expected an index as data_prep writes it: .*caption_ends"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    path = tmp_path / "index_x.npz"
    write_index(tmp_path, "x", _index())
    with np.load(path) as index:
        arrays = dict(index) | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=rf"index_x\.npz: .*{message}"):
        read_index(tmp_path, "x")


def test_a_cut_file_is_named(tmp_path):
    path = tmp_path / "index_x.npz"
    write_index(tmp_path, "x", _index())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"index_x\.npz: expected an index as data_prep writes it"):
        read_index(tmp_path, "x")
