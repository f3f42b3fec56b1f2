"""The plan of a ranking: what it counts, what the compiler says of memory, and a slice of a large gallery run in it."""

import weakref

import jax
import numpy as np
import pytest

from shnet_jax.evaluation import ranks
from shnet_jax.evaluation.tiles import Programs, make_tiling, programs
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.plan.rank_plan import measure_round, plan_ranking
from shnet_jax.types import Embedding

FLOAT = 4
TRAIN = 113_287, 566_435  # COCO, Karpathy split


def planned(n, t, dim, mesh, tile=512, seconds=None):
    item = Embedding(jax.ShapeDtypeStruct((1, dim), np.float32))
    return plan_ranking(n, t, (item, item), mesh, tile, RetrievalModel.score, seconds)


def mesh(devices):
    return data_mesh(jax.devices()[:devices])


class Dispatches:
    """Stands for `programs` and counts what is asked of them.

    most: bytes on all devices, after any dispatch, of what the programs were given or gave and somebody still holds. Of
    these arrays alone: a process has others, of other tests and their threads.
    """

    def __init__(self):
        self.rounds, self.most, self._arrays = 0, 0, weakref.WeakValueDictionary()

    def __call__(self, score, mesh):
        run = programs(score, mesh)

        def watched(fn):
            def call(*args):
                out = fn(*args)
                self._arrays |= {id(a): a for a in jax.tree.leaves((args, out)) if isinstance(a, jax.Array)}
                held = (s.data.nbytes for a in [*self._arrays.values()] for s in a.addressable_shards)
                self.most = max(self.most, sum(held))
                return out

            return call

        def scores(*args):
            self.rounds += 1
            return watched(run.scores)(*args)

        return Programs(scores, watched(run.at), watched(run.count))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_memory_is_that_of_a_tile_whatever_the_gallery(devices):
    small, large = (planned(n, t, 1024, mesh(devices)) for n, t in ((5_000, 25_000), TRAIN))
    assert small.bytes_per_device == large.bytes_per_device
    assert (large.rows, large.columns, large.devices) == (512, 4096, devices)
    tile = (512 + 4096) * 1024 * FLOAT + 512 * 4096 * FLOAT
    assert 2 * tile < large.bytes_per_device < 4 * tile
    assert large.bytes_per_device < planned(*TRAIN, 1024, mesh(devices), tile=1024).bytes_per_device


def test_memory_does_not_grow_with_the_devices():
    one, eight = (planned(*TRAIN, 1024, mesh(devices)).bytes_per_device for devices in (1, 8))
    assert eight <= 1.02 * one


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(("n", "t", "tile"), [(30, 90, 4), (7, 7, 100), (64, 640, 8)])
def test_the_rounds_are_those_that_ranking_makes(monkeypatch, devices, n, t, tile):
    dispatched = Dispatches()
    monkeypatch.setattr(ranks, "programs", dispatched)
    rng = np.random.default_rng(0)
    images, texts = (Embedding(rng.standard_normal((m, 4)).astype(np.float32)) for m in (n, t))
    ranks.ranks(images, texts, rng.permutation(np.arange(t) % n), RetrievalModel.score, tile, mesh(devices))
    plan = planned(n, t, 4, mesh(devices), tile)
    down = -(-n // (min(tile, n) * devices))
    assert plan.rounds - down < dispatched.rounds <= plan.rounds
    assert plan.work.flops == 2 * 4 * plan.rounds * plan.rows * plan.columns


def test_time_is_rounds_times_the_measured_round():
    item = Embedding(np.zeros((1, 16)), np.zeros((1, 3, 16)), np.zeros((1, 3), bool))
    seconds = measure_round((item, item), mesh(2), 8, RetrievalModel.score, repeats=1)
    assert seconds > 0
    plan = planned(*TRAIN, 16, mesh(2), tile=256, seconds=seconds)
    assert plan.seconds == pytest.approx(seconds * plan.rounds)
    # 222 rounds of 512 images for each of 277 tiles of captions, and a staircase through them.
    assert plan.rounds == 222 * 277 + 222 + 277 - 1
    assert "113,287 images x 566,435 captions" in str(plan) and f"{plan.tiles:,} tiles" in str(plan)
    assert "not measured" in str(planned(*TRAIN, 16, mesh(1), tile=8))


def test_sets_travel_only_for_a_score_that_looks_at_them():
    item = Embedding(np.zeros((1, 4)), np.zeros((1, 3, 4)), np.zeros((1, 3), bool))

    def of_sets(images, texts):
        return RetrievalModel.score(images, texts) + images.elements.sum((1, 2))[:, None] * texts.mask.sum(1)

    vectors, sets = (plan_ranking(64, 640, (item, item), mesh(1), 8, s) for s in (RetrievalModel.score, of_sets))
    assert sets.sent_per_device == vectors.sent_per_device // (4 * FLOAT) * ((4 + 12) * FLOAT + 3)
    assert sets.bytes_per_device > vectors.bytes_per_device


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_slice_of_the_largest_gallery_stays_within_the_stated_memory(tmp_path, monkeypatch, devices):
    """Two tiles of captions of COCO train against all its images, both read from files."""
    (n, t), dim, tile = TRAIN, 16, 256
    files = []
    for name, m in (("images", n), ("texts", t)):
        file = np.lib.format.open_memmap(tmp_path / name, "w+", np.float32, (m, dim))
        file[:] = np.random.default_rng(m).standard_normal((m, dim))
        file.flush()
        files.append(Embedding(np.load(tmp_path / name, mmap_mode="r")))
    owner = np.minimum(np.arange(t) // 5, n - 1)
    tiling = make_tiling(*files, tile, mesh(devices), owner)
    # Any numbers will do as scores of the matches that lie outside the slice: this is about memory, and these captions.
    positive = np.einsum("td,td->t", files[0].vector[owner], files[1].vector).astype(np.float64)
    dispatched = Dispatches()
    monkeypatch.setattr(ranks, "programs", dispatched)
    best = ranks.best_captions(positive, owner)
    tiles = (3, tiling.caption_tiles - 1)
    counts = ranks.count(tiling, RetrievalModel.score, positive, best, tiles)
    assert dispatched.rounds == 2 * tiling.rounds
    stated = planned(n, t, dim, mesh(devices), tile).bytes_per_device * devices
    assert tile * tile * 8 * FLOAT * devices < dispatched.most <= stated
    for tile_ in tiles:
        captions = tiling.captions(tile_)[0][::400]
        scores = files[1].vector[captions].astype(np.float64) @ files[0].vector.astype(np.float64).T
        wanted = (scores > positive[captions][:, None]).sum(axis=1)
        np.testing.assert_allclose(counts.t2i[captions], wanted, atol=2)  # its own image, and last bits
