"""A tiny data set on disk, written by the real builder, and a configuration to read it."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from data_prep.builder import write_dataset
from shnet_jax.data.records import open_dataset
from shnet_jax.data.tokenise import SPECIAL, tokenise_split, wordpiece

IMAGES, REGIONS, CELLS = 23, 6, 5
COUNTS = (5, 5, 1, 8, 2)  # captions of images 0, 1, 2, ... in turn
NOUNS = ("dog", "cat", "horse", "bird", "child", "woman", "man", "boat")
VERBS = ("runs", "jumps", "sleeps", "sits", "walks")
DIGITS = tuple("0123456789")


def _record(split, i):
    rng = np.random.default_rng([i, *split.encode()])
    mask = np.arange(REGIONS) < 1 + i % REGIONS  # image 0 has a single valid region
    regions = rng.normal(size=(REGIONS, 4)).astype(np.float16)
    captions = []
    for j in range(COUNTS[i % len(COUNTS)]):
        nouns = [NOUNS[(i + j + k) % len(NOUNS)] for k in range(1 + (i * j) % 4)]
        captions.append(f"the {' and the '.join(nouns)} {VERBS[(i + 2 * j) % len(VERBS)]} near picture {i}")
    return {
        "image_id": f"{split}{i}",
        "captions": captions,
        "regions": regions,  # not zero where masked: `gather` has to see to that
        "region_mask": mask,
        "grid": rng.normal(size=(CELLS, 3)).astype(np.float32),
        "seg_map": rng.integers(0, 11, (8, 8), dtype=np.uint8),
        "seg_semantic": rng.normal(size=(11, 2, 2)).astype(np.float16),
        "categories": rng.random(11) < 0.3,
    }


FIELDS = ("regions", "grid", "seg_semantic", "seg_map", "categories")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets")
    splits = {"train": [_record("train", i) for i in range(IMAGES)], "test": [_record("test", i) for i in range(7)]}
    return write_dataset(out, "tiny", splits, {"source": "made by the tests"})


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return open_dataset(tiny_folder)


@pytest.fixture
def config(tiny_folder) -> ConfigDict:
    c = base.get_config()
    c.data.dir = str(tiny_folder)
    c.data.prefetch = 2
    return c


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Numbers from 10 have several pieces, all other words one: captions have 8 to 18 tokens."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    words = ("the", "and", "near", "picture", *NOUNS, *VERBS, *DIGITS, *(f"##{digit}" for digit in DIGITS))
    path.write_text("\n".join((*SPECIAL, *words)), encoding="utf-8")
    return wordpiece(path)


@pytest.fixture(scope="session")
def captions(tiny, tokenizer):
    return tokenise_split(tiny, "train", tokenizer)
