"""Training with bfloat16 operands against training with float32, from data set to recalls."""

from __future__ import annotations

import numpy as np
import pytest

from shnet_jax.train.loop import train_and_evaluate
from tests.train import tiny

BAND = 60.0
"""Points of rSum (of 600) within which both precisions lie."""


def trained(workdir, dtype, seed=0):
    """(rSum on the 40 images trained on, losses) of 3SHNet: seen images, as 10 unseen ones hardly tell runs apart."""
    changes = {"data__val_split": "train", "loss__weights__infonce": 1.0, "loss__weights__triplet": 0.0}
    changes |= {"train__steps": 80, "train__batch_size": 100, "train__eval_epochs": 0.0, "train__log_steps": 10}
    changes |= {"train__checkpoint_steps": 80, "optim__ema": 0.0, "optim__lr": 3e-3, "data__word_change": 0.0}
    config = tiny.config(seed=seed, model__dtype=dtype, text__dtype=dtype, **changes)
    with tiny.quick():
        results = train_and_evaluate(config, workdir)
    return results.metrics["rsum"], [line["loss"] for line in tiny.lines(workdir) if line["kind"] == "train"]


@pytest.mark.slow
def test_bfloat16_trains_like_float32(tmp_path):
    exact, losses = trained(tmp_path / "float32", "float32")
    rounded, rounded_losses = trained(tmp_path / "bfloat16", "bfloat16")
    assert exact > 300 and abs(rounded - exact) < BAND
    assert losses != rounded_losses  # the option does something
    np.testing.assert_allclose(rounded_losses, losses, rtol=0.2)
