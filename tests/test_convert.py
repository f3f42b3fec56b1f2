"""From a checkpoint of the released code to embeddings, and our own weights out and in again."""

from __future__ import annotations

import argparse
import functools
import math
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from configs import base
from configs import user as user_config
from shnet_jax.interop.published import open_published, text_encoder_slots
from shnet_jax.interop.torch_weights import (
    image_encoder_slots,
    to_variables,
    user_image_encoder_slots,
    vse_encoder_slots,
)
from shnet_jax.models.bert import EPSILON
from shnet_jax.modes.convert import convert, load_folder, load_published, load_run
from shnet_jax.modes.evaluate import evaluate_checkpoint
from shnet_jax.modes.train import train
from shnet_jax.plan import planned_run
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.load import load
from shnet_jax.training.workdir import WorkdirError
from tests.interop.torch_writer import attributes, of_numpy, save
from tests.models import image_oracle, text_oracle
from tests.train import tiny

SIZES = {"model.dim": 8, "model.num_classes": 22, "model.map_channels": 4, "plan.region_dim": 200}
BERT = {"text.layers": 2, "text.width": 8, "text.mlp_dim": 12, "text.vocab_size": 12, "text.max_positions": 32}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "red", "blue", "circle", "square", "on")
OPTIONS = {"embed_size": 8, "img_dim": 200, "margin": 0.3, "num_epochs": 7, "lr_update": 4, "no_imgnorm": False}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


@functools.cache
def vocabulary() -> Path:
    path = tiny.folder() / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def config(**changes) -> ConfigDict:
    """What a user gives: the published configuration, the vocabulary and the heads, which no checkpoint tells."""
    c = base.get_config()
    flat = {"tokenizer.path": str(vocabulary()), "text.heads": 2, "eval.batch_size": 16, "parallel.devices": 1}
    c.update_from_flattened_dict(flat | {name.replace("__", "."): value for name, value in changes.items()})
    return c


@functools.cache
def states() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random arrays in torch's names and layouts of both encoders."""
    c = config()
    c.update_from_flattened_dict(SIZES | BERT)
    like = traverse_util.flatten_dict(planned_run.variable_shapes(planned_run.describe(c)))
    rng, found = np.random.default_rng(0), []
    for slots in (image_encoder_slots("image"), text_encoder_slots(2, "text")):
        state = {}
        for name, slot in slots.items():
            draw = (
                rng.uniform(0.5, 2.0, shape) if (shape := slot.theirs(like[slot.collection, *slot.path].shape)) else 0
            )
            draw = draw if "running_var" in name or name.endswith("Norm.weight") else rng.normal(0.0, 0.4, shape)
            state[name] = draw.astype(np.float32)
        found.append(state)
    return found[0], found[1]


def write(path: Path, image=None, text=None, **options) -> Path:
    """A checkpoint as the released script saves it, DataParallel and unused arrays included."""
    first, second = states()
    image = dict(image or first) | {
        "mlp.bns.1.weight": np.ones(8, np.float32),
        "mlp.bns.0.num_batches_tracked": np.array([3]),
    }
    text = dict(text or second) | {"bert.pooler.dense.bias": np.ones(8, np.float32)}
    model = [OrderedDict((f"module.{name}", array) for name, array in state.items()) for state in (image, text)]
    opt = options.pop("opt", None) or argparse.Namespace(**OPTIONS | options)
    return save(path, {"epoch": 3, "model": model, "best_rsum": 412.5, "opt": opt, "Eiters": 1234})


@functools.cache
def workdir() -> Path:
    """The work folder that the checkpoint becomes."""
    path = tiny.folder() / "published"
    source = write(tiny.folder() / "model_best.pth")
    convert(config(convert__source=str(source)), path)
    return path


def evaluation() -> ConfigDict:
    c = config(data__dir=str(tiny.dataset()))
    c.update_from_flattened_dict({name: value for name, value in SIZES.items() if name.startswith("model")})
    return c


def bert(tokens: np.ndarray, params) -> np.ndarray:
    x = np.asarray(params["words"], np.float64)[tokens] + np.asarray(params["positions"], np.float64)[: len(tokens)]
    x = text_oracle.layer_norm(x + np.asarray(params["types"], np.float64)[0], params["norm"], EPSILON)
    for i in range(2):
        p = params[f"layer_{i}"]
        x = text_oracle.layer_norm(x + text_oracle.attention(x, p["attention"], 2), p["attention_norm"], EPSILON)
        x = text_oracle.layer_norm(x + text_oracle.mlp(x, p["mlp"]), p["mlp_norm"], EPSILON)
    return x


@pytest.mark.slow
def test_a_published_checkpoint_is_evaluated_as_numpy_does():
    loaded = load(workdir(), evaluation())
    assert loaded.step == 1234
    c = loaded.experiment.config
    assert {name: c.model[name] for name in ("dim", "num_classes", "map_channels", "units")} == {
        "dim": 8,
        "num_classes": 22,
        "map_channels": 4,
        "units": ("regions",),
    }
    assert (c.loss.triplet.margin, c.train.epochs, c.optim.decay_epochs) == (0.3, 7.0, (4.0,))
    rng = np.random.default_rng(1)
    mask = np.arange(4) < np.array([4, 2])[:, None]
    tokens = rng.integers(5, 12, (2, 6)) * (np.arange(6) < np.array([6, 3])[:, None])
    batch = {
        "regions": rng.uniform(0.0, 1.0, (2, 4, 200)).astype(np.float32) * mask[..., None],
        "region_mask": mask,
        "seg_map": rng.integers(0, 22, (2, 5, 4)).astype(np.uint8),
        "seg_semantic": rng.uniform(0.0, 1.0, (2, 22, 2, 3)).astype(np.float32),
        "categories": rng.uniform(0.0, 1.0, (2, 22)) < 0.3,
        "tokens": tokens.astype(np.int32),
        "token_mask": tokens > 0,
    }
    images, texts = jax.jit(functools.partial(loaded.experiment.model.apply, train=False))(loaded.variables, batch)
    first, second = states()
    image = to_variables(first, image_encoder_slots())
    oracle = image_oracle.Encoder(image["params"], image["batch_stats"], c.model.to_dict())
    np.testing.assert_allclose(images.vector, oracle(batch), atol=2e-5)
    text = to_variables(second, text_encoder_slots(2))["params"]
    for ids, length, vector in zip(tokens, (6, 3), np.asarray(texts.vector), strict=True):
        words = text_oracle.dense(bert(ids[:length], text["tower"]), text["head"])
        pooled = image_oracle.pool(words, image_oracle.gpo_weights(length, text["pool"]))
        np.testing.assert_allclose(vector, pooled / (math.sqrt(pooled @ pooled) + 1e-8), atol=2e-5)


@pytest.mark.slow
def test_mode_eval_takes_it():
    results = evaluate_checkpoint(evaluation(), workdir())
    assert np.isfinite(results.metrics["rsum"])
    assert results.card["checkpoint_step"] == 1234 and results.card["selected_on"] == "none"


def test_it_can_be_evaluated_and_not_continued():
    saved = Checkpoints(workdir())
    state = argparse.Namespace(step=0, opt_state=(), rng=np.zeros(2), nonfinite=0)
    with pytest.raises(CheckpointError, match="holds weights alone"):
        saved._request(1234, "trainer", vars(state))


def test_a_checkpoint_without_segmentation_is_vse_infinity(tmp_path):
    image = {name: states()[0][name] for name in vse_encoder_slots()}
    model = load_published(config(), write(tmp_path / "vse.pth", image))
    assert not any(model.config.model[n] for n in ("semantic", "spatial", "scene_tokens", "category_token"))
    assert set(model.variables["params"]["image"]) == {"regions_linear", "regions_mlp", "pool"}
    np.testing.assert_array_equal(model.variables["params"]["image"]["regions_linear"]["kernel"], image["fc.weight"].T)


@pytest.mark.parametrize("own", [user_config, base])
def test_user(own, tmp_path):
    c, given = user_config.get_config(), own.get_config()
    flat = {"tokenizer.path": str(vocabulary()), "text.heads": 2, "parallel.devices": 1}
    for each in (c, given):
        each.update_from_flattened_dict(flat | BERT | {"model.dim": 8, "plan.region_dim": 200})
    like = traverse_util.flatten_dict(planned_run.variable_shapes(planned_run.describe(c)))
    rng = np.random.default_rng(2)
    image = {
        name: rng.uniform(0.5, 2.0, slot.theirs(like[slot.collection, *slot.path].shape)).astype(np.float32)
        for name, slot in user_image_encoder_slots("image").items()
    }
    model = load_published(given, write(tmp_path / "user.pth", image, moco_M=1024, attention_lamda=3.0))
    assert model.config.model.name == "user" and model.config.data.region_drop == 0
    assert model.config.model.user.guides == ("sge",) and model.config.model.user.attention_scale == 3.0
    assert model.config.momentum.queue == 1024
    kernel = model.variables["params"]["image"]["regions_sge"]["local"]["kernel"]
    np.testing.assert_array_equal(kernel, image["v_sa.embedding_local.0.weight"].T)


def test_bfloat16_becomes_float32(tmp_path):
    half = {name: array.astype(np.dtype("bfloat16")) for name, array in states()[1].items()}
    found = load_published(config(), write(tmp_path / "half.pth", text=half)).variables["params"]["text"]["head"]
    np.testing.assert_array_equal(found["kernel"], half["linear.weight"].astype(np.float32).T)
    assert found["kernel"].dtype == np.float32


def changed(state: dict[str, np.ndarray], **arrays) -> dict[str, np.ndarray]:
    new = dict(state)
    for name, array in arrays.items():
        name = name.replace("__", ".")
        new = {n: a for n, a in new.items() if n != name} if array is None else new | {name: array}
    return new


def test_every_misfit_is_named_at_once(tmp_path):
    image, text = states()
    image = changed(image, fc__weight2=np.ones(2, np.float32), mlp__bns__0__running_var=None)
    text = changed(text, linear__bias=np.ones(9, np.float32))
    path = write(tmp_path / "x.pth", image, text)
    with pytest.raises(ValueError, match="does not fit 3SHNet, region model") as fault:
        load_published(config(), path)
    assert str(fault.value).split("\n  ")[1:] == [
        "image encoder, missing: mlp.bns.0.running_var (4,)",
        "image encoder, unexpected: fc.weight2 (2,)",
        "text encoder, misshapen: linear.bias is (9,), expected (8,)",
    ]


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("fc__weight", np.full((8, 200), np.nan, np.float32), "fc.weight holds numbers that are not finite"),
        ("fc__weight", None, "of no known kind|fc.weight is missing"),
        ("embed_category__0__weight", None, r"embed_category\.0\.weight is missing"),
    ],
)
def test_arrays_of_no_use(name, value, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_published(config(), write(tmp_path / "x.pth", changed(states()[0], **{name: value})))


def test_options_as_an_easydict_with_numbers_of_numpy(tmp_path):
    numbers = {"margin": np.float64(0.3), "num_epochs": np.int64(7), "no_imgnorm": np.bool_(False)}
    options = OPTIONS | {name: of_numpy(number) for name, number in numbers.items()}
    expected = open_published(write(tmp_path / "plain.pth"))
    found = open_published(write(tmp_path / "easy.pth", opt=attributes("easydict", "EasyDict", options)))
    assert found.fields() == expected.fields() and found.options == OPTIONS
    np.testing.assert_array_equal(found.file.array(found.image["fc.weight"]), states()[0]["fc.weight"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"no_txtnorm": True}, r"opt\.no_txtnorm is True; .* have False"),
        ({"precomp_enc_type": "backbone"}, r"opt\.precomp_enc_type is 'backbone'"),
        ({"embed_size": 1024}, r"opt\.embed_size is 1024; the arrays, .* have 8"),
        ({"batch_size": float("inf")}, r"becomes config\.train\.batch_size is inf, expected a number that training"),
        ({"margin": float("nan")}, r"becomes config\.loss\.triplet\.margin is nan"),
    ],
)
def test_options_of_another_model(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_published(config(), write(tmp_path / "x.pth", **options))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"state_dict": {}}, "found state_dict"),
        ([1], "found a list"),
        ({"model": [{"a": 1}, {}]}, "image encoder is not a dict of tensors"),
        ({"model": [{}, {}]}, "of no known kind"),
        ({"model": [{"fc.weight": np.ones(2, np.float32)}, {"rnn.weight": np.ones(2, np.float32)}]}, "it is no BERT"),
        (
            {"model": [{n: np.ones(2, np.float32) for n in ("fc.weight", "module.fc.weight")}, {}]},
            "both with and without",
        ),
    ],
)
def test_files_of_another_kind(content, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_published(config(), save(tmp_path / "x.pth", content))


def test_the_vocabulary_must_be_its_own(tmp_path):
    path = write(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="has no vocabulary"):
        load_published(config(tokenizer__path=""), path)
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"has 12 tokens, .*vocab\.txt 11"):
        load_published(config(tokenizer__path=str(other)), path)
    with pytest.raises(ValueError, match=r"config\.text\.heads is 3"):
        load_published(config(text__heads=3), path)


def equal(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_out_and_in_again_bit_by_bit(tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    convert(config(convert__to=str(out)), workdir())
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "vocabulary.txt"]
    convert(config(convert__source=str(out)), again)
    assert "parameters of step 1234" in capsys.readouterr().out
    original, back = load_run(workdir()), load_run(again)
    equal(back.variables, original.variables)
    equal(load_folder(out).variables, original.variables)
    assert (back.step, original.step) == (1234, 1234)
    assert back.config.model == original.config.model
    loaded = load(again, evaluation())
    equal(loaded.variables, original.variables)
    with pytest.raises(WorkdirError, match="exists already"):
        convert(config(convert__to=str(out)), workdir())
    with pytest.raises(WorkdirError, match="holds checkpoints already"):
        convert(config(convert__source=str(out)), again)


def test_a_damaged_folder(tmp_path):
    out = tmp_path / "out"
    convert(config(convert__to=str(out)), workdir())
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_folder(out)
    weights.write_bytes(whole.replace(b"params/text/head/bias", b"params/text/head/dias"))
    with pytest.raises(
        ValueError, match=r"params/text/head/bias: axes absent, expected 1\n.*dias: axes 1, expected absent"
    ):
        load_folder(out)
    weights.write_bytes(whole.replace(b'"format":"shnet_jax"', b'"format":"something"'))
    with pytest.raises(ValueError, match=r"not written by --config\.convert\.to"):
        load_folder(out)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        load_folder(out)


@pytest.mark.slow
def test_the_averages_of_a_run_go_out(tmp_path):
    trained = tiny.config(model__name="tests.train.toy", train__steps=2)
    train(trained, tmp_path / "run")
    trained.convert.to = str(tmp_path / "out")
    convert(trained, tmp_path / "run")
    expected = load(tmp_path / "run", tiny.config(model__name="tests.train.toy"))
    model = load_folder(tmp_path / "out")
    equal(model.variables, expected.variables)
    assert model.config.optim.ema == 0


@pytest.mark.parametrize("both", [True, False])
def test_one_direction_at_a_time(both, tmp_path):
    c = config(convert__source="a", convert__to="b") if both else config()
    with pytest.raises(ValueError, match="give one"):
        convert(c, tmp_path)
