"""COCO's further judgements on a small gallery: read by number, scored through the streamed lists."""

import dataclasses
import json

import numpy as np
import pytest

from configs import base
from data_prep.builder import write_dataset
from shnet_jax.data.records import open_dataset
from shnet_jax.evaluation.ensemble import Embedded, combine
from shnet_jax.evaluation.evaluator import evaluate_embedded
from shnet_jax.evaluation.extra_metrics import (
    WITHIN,
    coco_number,
    extra_metrics,
    judgements_folder,
    read_extra_metrics,
    read_judgements,
    read_ratings,
    sibling_captions,
)
from shnet_jax.evaluation.metrics import hits
from shnet_jax.evaluation.protocols import Provenance
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.types import Embedding

N, OWN = 12, 3
IMAGES = np.arange(N) * 13 + 7
CAPTIONS = np.random.default_rng(0).permutation(N * OWN) + 500
OWNER = np.repeat(np.arange(N), OWN)
RATED_IMAGES = [(0, 1, 2.5), (2, 5, 4.9), (3, 4, 2.49), (5, 1, 3.0)]
RATED_CAPTIONS = [(0, 7, 3.0), (1, 20, 2.9), (35, 2, 5.0)]


def record(i, numbered=True):
    ids = {"caption_ids": CAPTIONS[i == OWNER].astype(np.int64)} if numbered else {}
    captions = [f"caption {i} {k}" for k in range(OWN)]
    image = f"COCO_val2014_{IMAGES[i]:012d}.jpg"
    return {"image_id": image, "captions": captions, "image_embedding": np.ones(4, np.float32)} | ids


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A data set, judgements like the package's and ratings like those of Crisscrossed Captions."""
    folder = tmp_path_factory.mktemp("coco")
    splits = {"test": [record(i) for i in range(N)]}
    dataset = open_dataset(write_dataset(folder / "sets", "coco", splits, {"source": "made by the tests"}))
    rng = np.random.default_rng(1)
    for name in ("eccv", "cxc"):
        i2t = {int(q): rng.choice(CAPTIONS, 4, replace=False).tolist() for q in IMAGES[:5]}
        t2i = {int(q): rng.choice(IMAGES, 2, replace=False).tolist() for q in CAPTIONS[:9]}
        for file, judged in ((f"{name}_image_to_caption", i2t), (f"{name}_caption_to_image", t2i)):
            (folder / f"{file}.json").write_text(json.dumps(judged))
    images = [f"COCO_val2014_{IMAGES[a]:012d}.jpg,COCO_val2014_{IMAGES[b]:012d}.jpg,{s},x" for a, b, s in RATED_IMAGES]
    (folder / "sis_test.csv").write_text("\n".join(["image1,image2,agg_score,sampling_method", *images, ""]))
    captions = [
        f"COCO_val2014:sentid:{CAPTIONS[a]},COCO_val2014:sentid:{CAPTIONS[b]},{s},x" for a, b, s in RATED_CAPTIONS
    ]
    (folder / "sts_test.csv").write_text("\n".join(["caption1,caption2,agg_score,sampling_method", *captions, ""]))
    return folder, dataset


def gallery(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((N, 6)).astype(np.float32)
    texts = images[OWNER] + rng.standard_normal((N * OWN, 6)).astype(np.float32)
    names = np.array([record(i)["image_id"] for i in range(N)])
    score, subject = RetrievalModel.score, Provenance("coco", "test")
    return Embedded("m", Embedding(images), Embedding(texts), score, OWNER, names, ("",) * len(OWNER), subject)


def found(one, dataset, **fields):
    evaluation = base.get_config().eval
    evaluation.update(fields)
    return extra_metrics(one, read_extra_metrics(dataset, "test", evaluation), tile=2, mesh=make_mesh(3))


def recall(lists, positives, k):
    """Share of the queries with any positive that have one among their first k."""
    return 100 * np.mean([bool(set(lists[q][:k].tolist()) & own) for q, own in positives.items() if own])


def test_nothing_is_asked_for_nothing_is_computed(coco):
    assert found(gallery(), coco[1]) == {}


def test_judgements_of_the_package(coco):
    folder, dataset = coco
    one = gallery()
    scores = one.images.vector.astype(np.float64) @ one.texts.vector.T.astype(np.float64)
    got = found(one, dataset, eccv=str(folder), hubness=True)
    assert {"eccv_i2t_map_at_r", "eccv_t2i_rprecision", "hubness_i2t", "hubness_t2i"} <= got.keys()
    lists = {"i2t": np.argsort(-scores, 1), "t2i": np.argsort(-scores.T, 1)}
    numbers = {"i2t": (IMAGES, CAPTIONS, "image_to_caption"), "t2i": (CAPTIONS, IMAGES, "caption_to_image")}
    for direction, (queries, items, file) in numbers.items():
        for name in ("cxc", "eccv"):
            judged = json.loads((folder / f"{name}_{file}.json").read_text())
            positives = {
                int(np.flatnonzero(queries == int(q))[0]): set(np.flatnonzero(np.isin(items, own)).tolist())
                for q, own in judged.items()
            }
            assert got[f"{name}_{direction}_r1"] == pytest.approx(recall(lists[direction], positives, 1))
            if name == "cxc":
                assert got[f"cxc_{direction}_r5"] == pytest.approx(recall(lists[direction], positives, 5))


@pytest.mark.parametrize("ensemble", [False, True])
def test_ratings_within_images_and_within_captions(coco, ensemble):
    folder, dataset = coco
    members = [gallery(0), gallery(1)] if ensemble else [gallery(0)]
    got = found(combine("both", members) if ensemble else members[0], dataset, cxc=str(folder))
    for direction, rated, least in (("i2i", RATED_IMAGES, 2.5), ("t2t", RATED_CAPTIONS, 3.0)):
        sides = [(m.images if direction == "i2i" else m.texts).vector.astype(np.float64) for m in members]
        scores = np.mean([x @ x.T for x in sides], axis=0)
        np.fill_diagonal(scores, 0)
        size = len(scores)
        positives = {q: set() for q in range(size)}
        for a, b, s in rated:
            if s >= least:
                positives[a].add(b)
                positives[b].add(a)
        if direction == "t2t":
            for q in range(size):
                positives[q] |= {o for o in range(size) if OWNER[o] == OWNER[q] and o != q}
        for k in (1, 5, 10):
            expected = recall(np.argsort(-scores, 1, kind="stable"), positives, k)
            assert got[f"cxc_{direction}_r{k}"] == pytest.approx(expected)


def test_within_a_modality_a_score_of_pairs_has_no_say(coco):
    folder, dataset = coco
    plain = gallery()

    def of_pairs(images, texts):
        raise AssertionError("asked for the score of two images, or of two captions")

    sides = [s.replace(elements=np.zeros((len(s.vector), 2, 3), np.float32)) for s in (plain.images, plain.texts)]
    odd = dataclasses.replace(plain, images=sides[0], texts=sides[1], score=of_pairs)
    got = found(plain, dataset, cxc=str(folder))
    assert found(odd, dataset, cxc=str(folder)) == got and "cxc_i2i_r1" in got
    evaluation = base.get_config().eval
    evaluation.cxc = str(folder)
    wanted = read_extra_metrics(dataset, "test", evaluation)
    results = evaluate_embedded(plain, wanted, evaluation, make_mesh(1), intervals=False)["whole"]
    assert results.card["within"] == WITHIN and results.extra == got


def test_a_relevant_item_that_is_not_in_the_gallery_is_never_found(tmp_path):
    for name in ("image_to_caption", "caption_to_image"):
        (tmp_path / f"eccv_{name}.json").write_text(json.dumps({7: [3, 90, 91], 8: [4]}))
    wanted, _ = read_judgements(tmp_path, "eccv", {7: 0, 8: 1}, {3: 0, 4: 1, 7: 2, 8: 3})
    assert wanted.counts.tolist() == [3, 1]
    found = hits(np.tile(np.arange(4), (2, 1)), wanted)
    assert found.tolist() == [[True, False, False, False], [False, True, False, False]]


def test_siblings_in_any_order():
    first, second = sibling_captions(np.array([1, 0, 1, 2, 1]))
    assert set(zip(first.tolist(), second.tolist(), strict=True)) == {(0, 2), (0, 4), (2, 0), (2, 4), (4, 0), (4, 2)}


@pytest.mark.parametrize(
    ("name", "number"), [("391895", 391895), ("COCO_val2014_000000391895.jpg", 391895), ("a:sentid:51", 51)]
)
def test_numbers(name, number):
    assert coco_number(name) == number


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        ({"7": 3}, "expected a number and the numbers of its relevant items, found '7': 3"),
        ({"x": [3]}, r"found 'x': \[3\]"),
        ({"7": ["three"]}, r"found '7': \['three'\]"),
        ({}, "expected judgements of all queries, found none"),
    ],
)
def test_judgements_that_are_none(judged, message, tmp_path):
    (tmp_path / "cxc_image_to_caption.json").write_text(json.dumps(judged))
    with pytest.raises(ValueError, match=rf"cxc_image_to_caption\.json: .*{message}"):
        read_judgements(tmp_path, "cxc", {7: 0}, {3: 0})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"1,2,nan\n", "line 2: expected two ids and a rating: 'nan' is no finite number"),
        (b"1,2\n", "line 2: expected two ids and a rating"),
        (b"1,2,\xff\n", "expected a table in UTF-8"),
        (b"1,2," + b"3" * 200_000 + b"\n", "expected a table in UTF-8: field larger than field limit"),
    ],
)
def test_ratings_that_are_none(lines, message, tmp_path):
    path = tmp_path / "sis_test.csv"
    path.write_bytes(b"image1,image2,agg_score,x\n" + lines)
    with pytest.raises(ValueError, match=rf"sis_test\.csv:? {message}"):
        read_ratings(path, "image", {1: 0, 2: 1})


def test_what_is_missing_is_named(coco, tmp_path):
    folder, dataset = coco
    with pytest.raises(FileNotFoundError, match=r"config\.eval\.eccv is 'nowhere'"):
        judgements_folder("nowhere")
    with pytest.raises(FileNotFoundError, match=r"eccv_image_to_caption\.json: expected this file"):
        found(gallery(), dataset, eccv=str(tmp_path))
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "cxc_caption_to_image.json").write_text(json.dumps({999: [int(IMAGES[0])]}))
    with pytest.raises(ValueError, match=r"cxc_caption_to_image\.json: query 999 is not among the 36"):
        found(gallery(), dataset, eccv=str(tmp_path))
    (tmp_path / "sis_test.csv").write_text("image1,image2,score\n1,2,3\n")
    with pytest.raises(ValueError, match=r"sis_test\.csv line 1: expected columns image1, image2, agg_score"):
        read_ratings(tmp_path / "sis_test.csv", "image", {})
    (tmp_path / "sis_test.csv").write_text("image1,image2,agg_score,x\n7,8,3,x\n")
    with pytest.raises(ValueError, match=r"sis_test\.csv line 2: image 7 is not in the split"):
        read_ratings(tmp_path / "sis_test.csv", "image", {})
    splits = {"test": [record(i, numbered=False) for i in range(N)]}
    bare = open_dataset(write_dataset(tmp_path, "bare", splits, {"source": "made by the tests"}))
    with pytest.raises(ValueError, match=r"no field caption_ids.*test_capids\.txt"):
        found(gallery(), bare, eccv=str(folder))
