import importlib.util
import json
import logging
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file as save_jax
from safetensors.numpy import save_file

from shnet_jax.interop import minilm
from shnet_jax.interop.bert_weights import bert_params, bert_slots, find_folder, load_bert, sizes
from shnet_jax.models.bert import BERT
from tests.interop.torch_writer import save

CONFIG = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 20,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
SIZES: dict[str, Any] = {
    "layers": 2,
    "width": 8,
    "heads": 2,
    "mlp_dim": 12,
    "vocab_size": 20,
    "max_positions": 16,
}
UNUSED = {
    "pooler.dense.weight": (8, 8),
    "pooler.dense.bias": (8,),
    "embeddings.position_ids": (1, 16),
    "cls.predictions.bias": (20,),
}
QUERY = "encoder.layer.1.attention.self.query.weight"


def arrays():
    """A tiny BERT in torch's names and layouts, with the parts that are not used."""
    shapes = {
        "embeddings.word_embeddings.weight": (20, 8),
        "embeddings.position_embeddings.weight": (16, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "intermediate.dense.weight": (12, 8),
        "intermediate.dense.bias": (12,),
        "output.dense.weight": (8, 12),
    }
    rng, tensors = np.random.default_rng(0), {}
    for name in [*bert_slots(2, ""), *UNUSED]:
        short = name.split(".", 3)[-1] if name.startswith("encoder") else name
        square = (8, 8) if name.endswith("weight") and "LayerNorm" not in name else (8,)
        shape = UNUSED.get(name) or shapes.get(short, square)
        tensors[name] = rng.normal(size=shape).astype(np.float32)
    return tensors


def write(folder, tensors, config=CONFIG, pieces=20):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"piece{i}\n" for i in range(pieces)))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder, tensors):
    write(folder, {})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, members in shards.items():
        save_file({n: tensors[n] for n in members}, folder / file)
    index = {"weight_map": {n: file for file, members in shards.items() for n in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_folder_fills_the_tower(tmp_path, caplog):
    tensors = arrays()
    folder = write(tmp_path / "bert", tensors)
    with caplog.at_level(logging.INFO):
        params = load_bert(folder)
    assert all(name in caplog.text for name in UNUSED)
    assert sizes(folder) == SIZES
    np.testing.assert_array_equal(params["layer_1"]["attention"]["query"]["kernel"], tensors[QUERY].T)
    np.testing.assert_array_equal(params["words"], tensors["embeddings.word_embeddings.weight"])
    tokens = jnp.ones((1, 4), jnp.int32)
    init = jax.eval_shape(lambda: BERT(**SIZES).init(jax.random.key(0), tokens, tokens > 0, train=False))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, init["params"])
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_shards_prefix_and_old_names_give_the_same(tmp_path):
    tensors = arrays()
    plain = load_bert(write(tmp_path / "plain", tensors))
    assert_equal(load_bert(write_shards(tmp_path / "shards", tensors)), plain)
    old = {
        "bert." + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): a
        for n, a in tensors.items()
    }
    assert sum("gamma" in n for n in old) == 5
    assert_equal(load_bert(write(tmp_path / "old", old)), plain)
    assert_equal(bert_params(old, SIZES), plain)


def test_a_pickled_folder_gives_the_same(tmp_path):
    plain, pickled = write(tmp_path / "plain", arrays()), write(tmp_path / "pickled", {})
    (pickled / "model.safetensors").unlink()
    save(pickled / "pytorch_model.bin", OrderedDict(arrays()))
    assert_equal(load_bert(pickled), load_bert(plain))


def test_bfloat16_weights_become_float32(tmp_path):
    tensors = {n: jnp.asarray(a, jnp.bfloat16) for n, a in arrays().items()}
    folder = write(tmp_path / "bert", {})
    save_jax(tensors, folder / "model.safetensors")
    words = load_bert(folder)["words"]
    assert words.dtype == np.float32
    np.testing.assert_array_equal(words, np.asarray(tensors["embeddings.word_embeddings.weight"], np.float32))


def test_each_misfit_is_named(tmp_path):
    tensors = arrays()

    def refused(changed, match):
        with pytest.raises(ValueError, match=match) as caught:
            load_bert(write(tmp_path / "bert", changed))
        assert str(tmp_path / "bert") in str(caught.value)

    refused(
        tensors | {"encoder.layer.2.output.dense.bias": np.zeros(8, np.float32)},
        r"layer\.2\.output\.dense\.bias",
    )
    refused({n: a for n, a in tensors.items() if n != QUERY}, rf"missing.*{QUERY}")
    refused(tensors | {QUERY: np.zeros((8, 4), np.float32)}, rf"{QUERY} is \(8, 4\), expected \(8, 8\)")
    refused(tensors | {QUERY: np.zeros(8, np.float32)}, rf"{QUERY} is \(8,\), expected \(8, 8\)")
    flat = "encoder.layer.0.intermediate.dense.weight"
    refused(tensors | {flat: tensors[flat].T.copy()}, rf"{flat} is \(8, 12\), expected \(12, 8\)")
    refused(tensors | {f"bert.{QUERY}": tensors[QUERY]}, f"two tensors are {QUERY}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "roberta"),
        ("model_type", None),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-5),
        ("type_vocab_size", 1),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("num_hidden_layers", None),
        ("hidden_size", 0),
    ],
)
def test_another_architecture_is_refused(tmp_path, field, value):
    folder = write(tmp_path / "bert", {}, CONFIG | {field: value})
    with pytest.raises(ValueError, match=f"config.json: {field} is {value!r}"):
        sizes(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_bert(tmp_path / "nowhere")
    folder = write(tmp_path / "bert", arrays())
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors nor .*index\.json nor pytorch_model\.bin$"
    ):
        load_bert(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: no file of torch\.save"):
        load_bert(folder)
    save(folder / "pytorch_model.bin", {"model": [1]})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: its content is not a dict of tensors"):
        load_bert(folder)
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt is missing"):
        load_bert(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        sizes(folder)


def test_damaged_files_are_named(tmp_path):
    folder = write(tmp_path / "bert", arrays(), pieces=21)
    with pytest.raises(ValueError, match=r"vocab\.txt has 21 pieces, .* vocab_size of 20"):
        load_bert(folder)
    write(folder, arrays())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        load_bert(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        load_bert(folder)


def test_shards_must_match_their_index(tmp_path):
    folder = write_shards(tmp_path / "bert", arrays())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, file, match in (
        (QUERY, "../b.safetensors", r"'\.\./b\.safetensors' is not a file of this folder"),
        (QUERY, "a.safetensors", rf"a\.safetensors: tensors \['{QUERY}'\]"),
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {name: file}}))
        with pytest.raises(ValueError, match=match):
            load_bert(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: .*weight_map"):
        load_bert(folder)
    path.write_text(json.dumps(index))
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        load_bert(folder)


def test_minilm_names_its_extra_and_checks_its_files(tmp_path, monkeypatch):
    minilm.folder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="make minilm"):
        find_folder("minilm")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*missing"):
        find_folder("minilm")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not the weights")
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256 is [0-9a-f]{64}, expected 53aa51"):
        find_folder("minilm")
    minilm.folder.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason="needs `make minilm`")
def test_minilm_puts_paraphrases_closer_than_other_sentences():
    tokenizers = pytest.importorskip("tokenizers")
    folder = find_folder("minilm")
    tokenizer = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(
        [
            "A man is riding a horse on the beach.",
            "Someone rides a horse along the sea shore.",
            "Two dogs are playing in the snow.",
            "A pair of puppies frolic in a snowy field.",
        ]
    )
    tokens = np.array([e.ids for e in encoded], np.int32)
    mask = np.array([e.attention_mask for e in encoded], bool)
    tower, params = BERT(**sizes(folder)), load_bert(folder)
    hidden = np.asarray(jax.jit(lambda p: tower.apply({"params": p}, tokens, mask, train=False))(params))
    mean = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    similarity = unit @ unit.T
    assert min(similarity[0, 1], similarity[2, 3]) > 0.6
    assert similarity[:2, 2:].max() < 0.2
