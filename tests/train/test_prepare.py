"""What is said before the first step of a run."""

import logging

from shnet_jax.experiment import assemble
from shnet_jax.train.prepare import prepare
from tests.train import tiny


def test_captions_that_are_cut_are_told(caplog):
    experiment = assemble(tiny.config(data__max_tokens=20))
    caplog.set_level(logging.WARNING, logger="shnet_jax")
    prepare(experiment)
    captions = [text for texts in experiment.dataset.captions("train") for text in texts]
    lengths = [len(pieces) + 2 for pieces in experiment.tokenizer.vocabulary.pieces(captions)]
    cut = sum(length > 20 for length in lengths)
    assert 0 < cut < len(captions) == 200
    said = (
        f"train: {cut} of 200 captions have more than config.data.max_tokens = 20 tokens and are cut; the longest has"
    )
    assert f"{said} {max(lengths)}" in caplog.text


def test_nothing_is_said_of_captions_that_fit(caplog):
    caplog.set_level(logging.WARNING, logger="shnet_jax")
    prepare(assemble(tiny.config(data__max_tokens=64, data__token_buckets=(64,))))
    assert "max_tokens" not in caplog.text
