"""A run on stored vectors, interrupted and resumed, ends bitwise as one that was not."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from configs import align
from data_prep.builder import write_dataset
from shnet_jax.modes.evaluate import evaluate_checkpoint
from shnet_jax.training.loop import train_and_evaluate
from tests.data.test_columns import records
from tests.data.test_vector_batches import dataset
from tests.train import tiny


def config():
    c = align.get_config("sail")
    c.data.dir, c.data.val_split = str(dataset().path), "train"
    c.data.captions_per_image, c.data.shuffle_block, c.data.prefetch, c.data.read_threads = 2, 2, 2, 1
    c.model.dim, c.model.dtype, c.text.dtype = 4, "float32", "float32"
    c.train.batch_size, c.train.microbatch, c.train.steps, c.train.checkpoint_steps = 8, 4, 6, 3
    c.train.eval_epochs, c.optim.lr, c.loss.sigmoid.scale_limits = 0.0, 0.05, (19.9, 20.1)
    c.parallel.devices = 1
    return c


@pytest.mark.slow
def test_a_set_without_a_vocabulary_is_trained_and_evaluated_on(tmp_path):
    folder = write_dataset(tmp_path, "plain", {"train": records()}, {})
    (folder / "sentencepiece.model").unlink()
    (folder / "checksums.json").unlink()
    c = config()
    c.data.dir, c.train.steps, c.eval.split = str(folder), 1, "train"
    with tiny.quick():
        train_and_evaluate(c, tmp_path / "run")
        assert evaluate_checkpoint(c, tmp_path / "run").metrics["rsum"] > 0


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    with tiny.quick():
        train_and_evaluate(config(), tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
        train_and_evaluate(config(), tmp_path / "resumed")
    middle, whole, resumed = (
        tiny.arrays(tmp_path / folder, step) for folder, step in (("whole", 3), ("whole", 6), ("resumed", 6))
    )
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    (scale,) = (name for name in whole if name.startswith("loss") and "log_scale" in name)
    # A step of Lion moves it by the rate, which is more than its limits are apart: it stands at one of them.
    np.testing.assert_allclose(np.exp(whole[scale]), 19.9 if whole[scale] < np.log(20) else 20.1, rtol=1e-6)
    moved = [name for name in whole if "kernel" in name and not np.array_equal(middle[name], whole[name])]
    assert moved
