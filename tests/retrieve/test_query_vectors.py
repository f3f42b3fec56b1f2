"""Queries given as vectors of tokens: padding is masked as in the data set."""

from __future__ import annotations

import numpy as np
import pytest

from configs import align
from data_prep.builder import write_dataset
from shnet_jax.data.gallery import open_gallery
from shnet_jax.evaluation.encode import Towers, encode_parts
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.modes.embed import one_process_mesh
from shnet_jax.retrieve.searcher import encode_vectors

LENGTHS = [1, 2, 4, 3, 4, 1]


def records():
    rng = np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        mask = np.arange(4) < length
        tokens = rng.normal(size=(1, 4, 3)).astype(np.float32) * mask[:, None]
        yield {
            "image_id": f"image {i}",
            "captions": [f"caption {i}"],
            "image_embedding": rng.normal(size=5).astype(np.float32),
            "caption_tokens": tokens,
            "caption_token_mask": mask[None],
        }


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    c = align.get_config("small")
    c.data.dir = str(write_dataset(tmp_path_factory.mktemp("tokens"), "tokens", {"train": records()}, {}))
    c.model.dim, c.model.dtype, c.text.dtype, c.text.source = 4, "float32", "float32", "caption_tokens"
    c.eval.batch_size, c.parallel.devices = 4, 1
    mesh, experiment = one_process_mesh(c), assemble(c)
    _, tower = Towers(experiment, mesh, mesh).place(init_variables(experiment, 0))
    return experiment, tower


def test_zero_padding_is_masked_as_in_the_gallery(placed):
    experiment, tower = placed
    tokens = np.concatenate([record["caption_tokens"] for record in records()])
    gallery = open_gallery(
        *(experiment.config, experiment.dataset, "train", experiment.tokenizer),
        *(experiment.fields, experiment.text_fields),
    )
    expected = encode_parts(tower, gallery.text_batches(4), len(tokens)).vector
    np.testing.assert_allclose(
        encode_vectors(experiment, tower, {"caption_tokens": tokens}).vector, expected, atol=1e-6
    )


def test_a_query_of_padding_alone_is_refused(placed):
    with pytest.raises(ValueError, match="row 1 is all zero: it has no token"):
        encode_vectors(*placed, {"caption_tokens": np.ones((3, 4, 3)) * np.array([1, 0, 1])[:, None, None]})
