"""Photographs to a data set by the command lines, with the true loading code and tiny models."""

import numpy as np
import pytest

from data_prep import verify
from data_prep.extract import __main__ as command
from data_prep.extract.pool import box_average
from shnet_jax.data.records import open_dataset
from tests.data_prep.extract.models import write_captions

torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")


def _flags(made, out, segmenter="mask2former", *more):
    folder, names, models = made
    write_captions(folder / "captions.csv", names)
    return [
        f"--images={folder}",
        f"--captions={folder / 'captions.csv'}",
        f"--segmenter={models[segmenter]}",
        f"--backbone={models['clip']}",
        "--regions=6",
        "--device=cpu",
        "--batch_size=3",
        "--name=photographs",
        f"--out={out}",
        *more,
    ]


def _records(out):
    dataset = open_dataset(out)
    return [r for split in dataset.splits for r in dataset.open_split(split, list(dataset.features))]


@pytest.mark.parametrize("segmenter", ["mask2former", "detr"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_field_of_3shnet(made, tmp_path, segmenter, dtype):
    assert command.main(_flags(made, tmp_path, segmenter, f"--feature_dtype={dtype}")) == 0
    records = _records(tmp_path)
    assert open_dataset(tmp_path).splits == {"train": 3, "val": 1}
    shapes = {
        "regions": (6, 32),
        "region_mask": (6,),
        "boxes": (6, 4),
        "box_classes": (6,),
        "box_scores": (6,),
        "grid": (16, 32),
        "seg_semantic": (133, 7, 7),
        "seg_map": (64, 64),
        "categories": (133,),
        "image_embedding": (16,),
    }
    for record in records:
        assert {name: record[name].shape for name in shapes} == shapes
        assert record["regions"].dtype.name == record["grid"].dtype.name == dtype
        valid = record["region_mask"]
        assert valid.any() and not record["regions"][~valid].any()
        pooled = box_average(record["grid"].astype(np.float32).reshape(4, 4, 32), record["boxes"][valid])
        np.testing.assert_allclose(record["regions"][valid].astype(np.float32), pooled, atol=0.03)
    assert verify.main([str(tmp_path)]) == 0


def test_only_a_segmenter_and_only_a_backbone(made, tmp_path):
    for left_out, fields in (
        ("--backbone=", {"boxes", "box_classes", "box_scores", "seg_semantic", "seg_map", "categories"}),
        ("--segmenter=", {"grid", "image_embedding"}),
    ):
        flags = [flag for flag in _flags(made, tmp_path / left_out) if not flag.startswith(left_out)]
        assert command.main(flags) == 0
        assert set(_records(tmp_path / left_out)[0]) == fields | {"image_id", "captions"}


def test_projected_tokens_are_as_wide_as_the_embedding(made, tmp_path):
    assert command.main(_flags(made, tmp_path, "mask2former", "--tokens=projected")) == 0
    record = _records(tmp_path)[0]
    assert record["grid"].shape == (16, 16) and record["regions"].shape == (6, 16)
    assert record["image_embedding"].shape == (16,)


def test_a_beam_pipeline_writes_the_same_set(made, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra `beam`: make test-extract")
    from data_prep.extract import beam

    assert command.main(_flags(made, tmp_path / "here")) == 0
    # --region is Beam's, for Dataflow
    assert beam.main([*_flags(made, tmp_path / "beam"), "--runner=DirectRunner", "--region=europe-west1"]) == 0
    here, there = (_records(tmp_path / place) for place in ("here", "beam"))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name)


def test_the_beam_pipeline_reports_a_broken_photograph(made, tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="needs the extra `beam`: make test-extract")
    from data_prep.extract import beam

    flags = _flags(made, tmp_path)
    (made[0] / "captions.csv").write_text("image,caption,split\nabsent.jpg,a,train\nrocket.jpg,b,train\n")
    assert beam.main(flags) == 0
    assert "left out 1 photographs that cannot be read: absent.jpg" in capsys.readouterr().err
