"""Warnings and errors before the first step of a run: captions, vocabularies, weights."""

import json
import logging
import re

import pytest
from tokenizers import BertWordPieceTokenizer

from shnet_jax.data import tokenise
from shnet_jax.data.records import open_dataset
from shnet_jax.experiment import assemble
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.training.load import load
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.training.setup import training_data
from shnet_jax.training.workdir import WorkdirError, claim
from tests.interop.test_bert_weights import CONFIG, arrays, write
from tests.train import tiny


def test_captions_that_are_cut_are_told(caplog):
    experiment = assemble(tiny.config(data__max_tokens=20))
    caplog.set_level(logging.WARNING, logger="shnet_jax")
    training_data(experiment, make_mesh(1))
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
    training_data(assemble(tiny.config(data__max_tokens=64, data__token_buckets=(64,))), make_mesh(1))
    assert "max_tokens" not in caplog.text


def vocabulary(folder, *pieces):
    path = folder / "vocab.txt"
    path.write_text("\n".join((*tokenise.SPECIAL, *pieces)), encoding="utf-8")
    return path


@pytest.mark.parametrize("known", [True, False])
def test_unknown_pieces_of_the_captions_are_told(known, caplog, tmp_path):
    captions = [text for texts in open_dataset(tiny.dataset()).captions("train") for text in texts]
    words = sorted({word for text in captions for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    path = vocabulary(tmp_path, *(words if known else words[::2]))
    caplog.set_level(logging.INFO, logger="shnet_jax")
    config = tiny.config(tokenizer__kind="wordpiece", tokenizer__path=str(path), data__word_mask=0.0)
    training_data(assemble(config), make_mesh(1))
    assert ("train: 0.00 % of the pieces of the captions are unknown" in caplog.text) == known
    warned = [record for record in caplog.records if record.levelno == logging.WARNING and "[UNK]" in record.message]
    assert bool(warned) == (not known)


def test_a_run_keeps_the_settings_of_its_vocabulary(tmp_path):
    path = vocabulary(tmp_path, "Red", "red", "star")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"do_lower_case": false}')
    changes = {"model__name": "tests.train.toy", "train__steps": 1, "data__word_mask": 0.0}
    config = tiny.config(tokenizer__kind="wordpiece", tokenizer__path=str(path), **changes)
    run = tmp_path / "run"
    with tiny.quick():
        train_and_evaluate(config, run)
    assert [found.name for found in run.glob("vocabulary.*")] == ["vocabulary.json"]
    claim(run, assemble(config))  # nothing has changed
    loaded = load(run, config).experiment.tokenizer
    assert loaded.vocabulary.pieces(["Red red star"]) == [[5, 6, 7]]
    settings.write_text('{"do_lower_case": true}')
    differs = r"vocab\.txt differs from what the run began with, vocabulary\.json; .*--config\.tokenizer\.path=(.*)"
    with pytest.raises(WorkdirError, match=differs) as refused:
        claim(run, assemble(config))
    named = re.search(differs, str(refused.value))[1]
    claim(run, assemble(tiny.config(tokenizer__kind="wordpiece", tokenizer__path=named, **changes)))
    settings.unlink()
    path.unlink()
    assert load(run, config).experiment.tokenizer.vocabulary.pieces(["Red red star"]) == [[5, 6, 7]]


def test_weights_with_a_tokenizer_json_alone(tmp_path):
    folder = write(tmp_path / "bert", arrays())
    BertWordPieceTokenizer({piece: i for i, piece in enumerate((*tokenise.SPECIAL, "red", "star"))}).save(
        str(folder / "tokenizer.json")
    )
    (folder / "vocab.txt").unlink()
    config = tiny.config(tokenizer__kind="wordpiece", text__tower="bert", text__weights=str(folder))
    config.data.max_tokens, config.data.token_buckets = 16, (16,)
    with pytest.raises(ValueError, match="the text tower has 20 tokens, the tokenizer 7"):
        assemble(config)
    pieces = (*tokenise.SPECIAL, "red", "star", *(f"w{i}" for i in range(9)))
    BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)}).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 16}))
    experiment = assemble(config)
    assert experiment.tokenizer.vocabulary.pieces(["A red star"]) == [[1, 5, 6]]
    assert experiment.config.text.vocab_size == experiment.tokenizer.vocab_size == 16


def test_rows_of_an_embedding_that_no_token_has(tmp_path):
    folder = write(tmp_path / "bert", arrays(), CONFIG | {"vocab_size": 24})
    (folder / "vocab.txt").write_text("\n".join((*tokenise.SPECIAL, "red", "star")), encoding="utf-8")
    config = tiny.config(tokenizer__kind="wordpiece", text__tower="bert", text__weights=str(folder))
    config.data.max_tokens, config.data.token_buckets = 16, (16,)
    experiment = assemble(config)
    assert (experiment.config.text.vocab_size, experiment.tokenizer.vocab_size) == (24, 7)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 136}))
    with pytest.raises(ValueError, match="the text tower has 136 tokens, the tokenizer 7"):
        assemble(config)
