"""What importers are given is what a data set holds, bit by bit, whatever the shapes, dtypes and sentences."""

from __future__ import annotations

import base64

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import from_scan
from data_prep.builder import write_dataset
from data_prep.schema import is_text
from data_prep.sources import bottom_up
from data_prep.sources.boxes import MAX_SIDE
from shnet_jax.data.records import open_dataset

SENTENCE = st.text(max_size=30).filter(is_text)
FLOATS = (np.float16, np.float32, ml_dtypes.bfloat16)


def floats(rng, shape, dtype):
    """Any finite values: subnormal, -0.0, the largest."""
    array = np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    return np.where(np.isfinite(array.astype(np.float32)), array, np.dtype(dtype).type(-0.0)).astype(dtype)


def same(found, expected, name=""):
    assert found.dtype == expected.dtype and found.shape == expected.shape, name
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), name


@st.composite
def records(draw):
    """Two to four records alike in shapes and dtypes, each with sentences of its own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, d, g, e, r = draw(st.tuples(*[st.integers(1, 4)] * 4, st.integers(0, 3)))
    regions, grid = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    fields = draw(st.sets(st.sampled_from(["grid", "relations", "seg_map", "categories", "identity", "box_classes"])))
    made = []
    for number in range(draw(st.integers(2, 4))):
        sentences = draw(st.lists(SENTENCE, min_size=1, max_size=4))
        mask = rng.random(k) < 0.5
        mask[rng.integers(k)] = True
        record = {
            "image_id": f"{draw(SENTENCE)}{number}",
            "captions": sentences,
            "caption_ids": rng.integers(-(2**63), 2**63, len(sentences)),
            "regions": floats(rng, (k, d), regions),
            "region_mask": mask,
            "image_embedding": floats(rng, (e,), np.float32),
            "grid": floats(rng, (g, d), grid),
            "relations": np.full((r, 3), -1, np.int32),
            "seg_map": rng.integers(0, 12, (3, g), dtype=np.uint8),
            "categories": rng.random(11) < 0.5,
            "identity": np.int64(rng.integers(0, 2**63)),
            "box_classes": rng.integers(0, 2**31, k).astype(np.int32),
        }
        optional = {"grid", "relations", "seg_map", "categories", "identity", "box_classes"}
        made.append({name: value for name, value in record.items() if name not in optional or name in fields})
    return made


@settings(max_examples=10)
@given(records())
def test_records_come_back_bit_by_bit(tmp_path_factory, given_records):
    path = write_dataset(tmp_path_factory.mktemp("set"), "toy", {"train": given_records}, {"source": "test"})
    dataset = open_dataset(path)
    read = list(dataset.open_split("train", list(dataset.features)))
    assert len(read) == len(given_records) and {*read[0]} == {*given_records[0]}
    for actual, expected in zip(read, given_records, strict=True):
        assert actual.pop("image_id") == expected["image_id"] and actual.pop("captions") == expected["captions"]
        for name, value in actual.items():
            same(np.asarray(value), np.asarray(expected[name]), name)
    assert list(dataset.captions("train")) == [record["captions"] for record in given_records]
    assert dataset.image_ids("train").tolist() == [record["image_id"] for record in given_records]


@settings(max_examples=6)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float16, np.float32, ">f4"]),
    st.tuples(*[st.integers(1, 4)] * 4),
    st.booleans(),
)
def test_arrays_of_the_scan_layout_come_back_bit_by_bit(tmp_path_factory, seed, dtype, sizes, fortran):
    src, rng, (n, k, d, per) = tmp_path_factory.mktemp("src"), np.random.default_rng(seed), sizes
    native = np.dtype(dtype).newbyteorder("=")
    regions = floats(rng, (n, k, d), native)
    np.save(src / "x_ims.npy", np.asarray(regions, dtype, order="F" if fortran else "C"))
    (src / "x_ids.txt").write_text("".join(f"{i}.jpg\n" for i in range(n)))
    (src / "x_caps.txt").write_text("".join(f"caption {i}\n" for i in range(n * per)))
    path = from_scan.import_scan(src, "toy", src / "out", captions_per_image=per, feature_dtype=None)
    for record, expected in zip(open_dataset(path).open_split("x", ["regions", "captions"]), regions, strict=True):
        same(record["regions"], expected)
        assert len(record["captions"]) == per


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4), st.integers(1, 2**24), st.booleans())
def test_a_line_of_bottom_up_attention_comes_back(seed, count, dim, side, long):
    rng = np.random.default_rng(seed)
    features, boxes = (floats(rng, (count, size), np.float32) for size in (dim, 4))
    ids, sure = rng.integers(-(2**63), 2**63, count), floats(rng, (count,), np.float32)
    cells = [base64.b64encode(array.tobytes()).decode() for array in (ids, sure, ids, sure)] if long else []
    sizes = [str(2 * side), str(side)] if not long else [str(side), str(2 * side)]
    if 2 * side > MAX_SIDE:
        return
    ends = [str(count), *(base64.b64encode(array.tobytes()).decode() for array in (boxes, features))]
    record = bottom_up.parse("\t".join(["7", *sizes, *cells, *ends]).encode() + b"\r\n", "here")
    same(record["regions"], features)
    with np.errstate(all="ignore"):
        same(record["boxes"], boxes / np.array([2 * side, side, 2 * side, side], np.float32))
    if long:
        same(record["box_classes"], ids)
        same(record["box_scores"], sure)
