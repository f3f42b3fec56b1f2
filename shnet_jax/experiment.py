"""Builds the parts of a run from its configuration: data set, tokenizer, model, initial variables."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax import registry
from shnet_jax.data import clip_bpe, siglip_tokens, wordpiece
from shnet_jax.data.records import DataSet, open_dataset
from shnet_jax.data.tokenise import WITHOUT_TOKENS, Tokenizer, has_vocabulary, load_tokenizer
from shnet_jax.data.vector_batches import with_masks
from shnet_jax.interop import bert_weights, clip_weights, siglip_weights
from shnet_jax.interop.sentence_vectors import Description, SentenceEncoder
from shnet_jax.models.contract import RetrievalModel, check_activations
from shnet_jax.models.text import VECTORS, text_fields
from shnet_jax.observe.machine import fast_dtype
from shnet_jax.types import Batch

log = logging.getLogger(__name__)

AUTO = "auto"
"""Value of model.dtype and text.dtype that stands for the dtype that the device is fast at."""
MOST_SPARE = 128
"""Bound on unused rows of a token embedding: some models round their number up to a multiple of 8, 64 or 128."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run: complete configuration, data set, tokenizer, model.

    config: with the dtypes, and the sizes that weights or tokenizer decide, filled in.
    fields: fields of a record that the model reads. text_fields: those of captions that its text side reads in place of
      tokens. notes: remark on optional fields for the protocol card, or "".
    """

    config: FrozenConfigDict
    dataset: DataSet
    tokenizer: Tokenizer
    model: RetrievalModel
    fields: tuple[str, ...]
    notes: str = ""
    text_fields: tuple[str, ...] = ()


def assemble(config: ConfigDict, dataset: DataSet | None = None) -> Experiment:
    """Builds the parts of a run and checks that data set and model fit; nothing is computed or written.

    dataset: taken where config.data.dir is empty: the shapes of a data set that is not here.
    Raises ValueError or FileNotFoundError with what to change.
    """
    config = ConfigDict(config.to_dict())
    if not config.data.dir and dataset is None:
        raise ValueError("config.data.dir is empty: give the folder of a data set, --config.data.dir=DIR")
    dataset = open_dataset(config.data.dir) if config.data.dir or dataset is None else dataset
    settle_dtypes(config)
    fit_weights(config)
    vectors = config.text.tower == VECTORS
    if vectors and not config.tokenizer.path:
        config.tokenizer.kind = "sentencepiece"  # the data set's own, if it has one: no token is read
    tokenizer = WITHOUT_TOKENS if vectors and not has_vocabulary(config) else _fitting_tokenizer(config)
    module = registry.model(config.model.name)
    fields, of_texts = module.image_fields(config), text_fields(config)
    _check_fields(config, dataset, (*fields, *of_texts))
    _fit_classifier(config, dataset)
    optional, notes = optional_fields(module, config, dataset)
    if notes:
        log.info("%s: %s", dataset.path, notes)
    model, fields = module.build(config), (*fields, *optional)
    check_activations(model, config)
    return Experiment(FrozenConfigDict(config), dataset, tokenizer, model, fields, notes, of_texts)


def _fitting_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer that the configuration names; fills in the size of its vocabulary.

    Raises ValueError for another size than the text tower has.
    """
    tokenizer = load_tokenizer(config)
    spare = config.text.vocab_size - tokenizer.vocab_size
    padded = 0 < spare < MOST_SPARE and config.text.vocab_size % 8 == 0
    if config.text.vocab_size and spare and not padded:
        raise ValueError(
            f"the text tower has {config.text.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}: "
            "set config.tokenizer to the vocabulary that the text tower was trained with"
        )
    config.text.vocab_size = config.text.vocab_size or tokenizer.vocab_size
    return tokenizer


def automatic(config: ConfigDict) -> list[str]:
    """Sections of a configuration whose dtype is AUTO."""
    return [section for section in ("model", "text") if config[section].dtype == AUTO]


def settle_dtypes(config: ConfigDict, device: jax.Device | None = None) -> None:
    """Replaces AUTO by the dtype that `device` is fast at. device: None for the first one of this machine."""
    if sections := automatic(config):
        dtype, why = fast_dtype(device or jax.local_devices()[0])
        for section in sections:
            config[section].dtype = dtype
        log.info("%s: auto is %s on %s", " and ".join(f"config.{s}.dtype" for s in sections), dtype, why)


def optional_fields(module: ModuleType, config: ConfigDict, dataset: DataSet) -> tuple[tuple[str, ...], str]:
    """The first optional field of a model that this data set has, () or (field,), and a remark on it for results."""
    optional: dict[str, str] = module.optional_fields(config) if hasattr(module, "optional_fields") else {}
    if not optional:
        return (), ""
    for field in optional:
        if field in dataset.features:
            return (field,), f"{field}: {dataset.metadata.get(f'{field}_source', 'as imported')}"
    return (), f"no {' or '.join(optional)}: {next(iter(optional.values()))}"


def fit_weights(config: ConfigDict) -> None:
    """Fills in the sizes and the vocabulary of the folder `config.text.weights`, if one is named.

    Raises ValueError for weights of another text tower, or with fewer positions than data.max_tokens;
    FileNotFoundError where there is no such folder.
    """
    if config.text.weights and config.text.tower == "clip":
        _fit_clip(config)
    elif config.text.weights and config.text.tower == "siglip":
        _fit_siglip(config)
    elif config.text.weights:
        if config.text.tower == VECTORS:
            raise ValueError(
                f"config.text.weights is {config.text.weights!r} and config.text.tower 'vectors': the stored vectors "
                "need no weights; leave text.weights empty"
            )
        if config.text.tower != "bert":
            raise ValueError(
                f"config.text.weights are those of a BERT, a CLIP or a SigLIP, config.text.tower is "
                f"{config.text.tower!r}; for its vocabulary alone set config.tokenizer.path"
            )
        folder = bert_weights.find_folder(config.text.weights)
        config.text.update(bert_weights.sizes(folder))
        if config.tokenizer.kind == "wordpiece" and not config.tokenizer.path:
            config.tokenizer.path = str(wordpiece.find_vocabulary(folder))
    if config.data.max_tokens > config.text.max_positions:
        raise ValueError(
            f"config.data.max_tokens is {config.data.max_tokens}, "
            f"the text tower has {config.text.max_positions} positions"
        )


def _fit_clip(config: ConfigDict) -> None:
    """Fills in the sizes of both towers and the vocabulary of the CLIP folder `config.text.weights`."""
    folder = Path(config.text.weights).expanduser()
    text, vision = clip_weights.sizes(folder)
    config.text.update(text)
    if "clip" in config.model:
        config.model.clip.update(vision)
    if config.tokenizer.kind == "clip" and not config.tokenizer.path:
        config.tokenizer.path = str(clip_bpe.find_vocabulary(folder))


def _fit_siglip(config: ConfigDict) -> None:
    """Fills in the sizes of the text tower and the vocabulary of the SigLIP folder `config.text.weights`."""
    folder = Path(config.text.weights).expanduser()
    config.text.update(siglip_weights.sizes(folder))
    if config.data.max_tokens != config.text.max_positions:
        raise ValueError(
            f"config.data.max_tokens is {config.data.max_tokens}: a SigLIP reads captions filled up to all "
            f"{config.text.max_positions} of its positions, so set it and the last of token_buckets to that"
        )
    if config.tokenizer.kind == "siglip" and not config.tokenizer.path:
        config.tokenizer.path = str(siglip_tokens.find_vocabulary(folder))


def _fit_classifier(config: ConfigDict, dataset: DataSet) -> None:
    """Fills in the sizes of the classifier of persons, when it is trained and they are not given."""
    if not config.loss.weights.get("identity", 0.0):
        return
    identity = config.loss.identity
    identity.dim = identity.dim or config.model.dim
    if not identity.classes:
        people = dataset.identities(config.data.train_split)
        if people is None or not config.data.identity:
            raise ValueError(
                f"config.loss.weights.identity is above 0, which needs a data set with the field identity and "
                f"config.data.identity; {dataset.path} has {', '.join(dataset.features)}"
            )
        identity.classes = len(np.unique(people))


def _check_fields(config: ConfigDict, dataset: DataSet, fields: tuple[str, ...]) -> None:
    if missing := [f for f in fields if f not in dataset.features]:
        raise ValueError(
            f"{dataset.path}: the model reads {', '.join(fields)}, but this data set has no {', '.join(missing)}; "
            f"it has {', '.join(dataset.features)}. Import the arrays, or switch off what needs them in config.model"
        )
    of_classes = {"seg_map", "categories", "seg_semantic"} & {*fields}
    if of_classes and dataset.num_classes not in (None, config.model.num_classes):
        raise ValueError(
            f"{dataset.path} has {dataset.num_classes} classes and config.model.num_classes is "
            f"{config.model.num_classes}: add --config.model.num_classes={dataset.num_classes}"
        )


def sentence_vectors(experiment: Experiment, texts: Sequence[str]) -> np.ndarray:
    """Vectors of sentences, [t, E] float32, by the model that made the `caption_embeddings` of the data set.

    Raises ValueError for a data set that does not say which that is, or one that is no BERT of a folder here.
    """
    dataset, way = experiment.dataset, "give vectors of the queries instead, --query_vectors=FILE.npy"
    if experiment.text_fields != ("caption_embeddings",):
        raise ValueError(f"this run reads {', '.join(experiment.text_fields)} of a caption, not its words: {way}")
    if "text_encoder" not in dataset.metadata:
        raise ValueError(f"{dataset.path}: does not say which model made its caption_embeddings: {way}")
    description = Description.parse(dataset.metadata["text_encoder"], dataset.path)
    try:
        return _sentence_encoder(description).encode(texts)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"the model of the stored vectors, {description.encoder}, cannot be used: {error}; {way}"
        ) from None


@functools.lru_cache(maxsize=1)
def _sentence_encoder(description: Description) -> SentenceEncoder:
    return SentenceEncoder(description)


def dummy_batch(experiment: Experiment) -> Batch:
    """One example of zeros in the shapes of the data set, to trace the model with."""
    batch: dict[str, Any] = {"image_index": np.zeros(1, np.int32)}
    for field in experiment.fields:
        feature = experiment.dataset.features[field]
        dtype = np.float32 if jnp.issubdtype(feature.dtype, jnp.floating) else feature.dtype
        batch[field] = np.zeros((1, *feature.shape), dtype)
    if experiment.text_fields:
        for field in with_masks(experiment.dataset, experiment.text_fields):
            feature = experiment.dataset.features[field]
            batch[field] = np.ones((1, *feature.shape[1:]), bool if feature.dtype == bool else np.float32)
        return batch
    tokens = min(experiment.config.data.token_buckets)
    return batch | {"tokens": np.zeros((1, tokens), np.int32), "token_mask": np.ones((1, tokens), bool)}


def init_variables(experiment: Experiment, seed: int) -> dict[str, Any]:
    """Initial {"params", "batch_stats"}: random from `seed`, the text tower from `config.text.weights` if given."""
    batch = dummy_batch(experiment)
    # It runs once, for milliseconds; with LLVM's optimisation it compiles twice as long.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    @functools.partial(jax.jit, compiler_options=quick)
    def init(key: jax.Array) -> dict[str, Any]:
        # Without what the model sows: the forward pass that makes it would be compiled, which takes many seconds.
        made = experiment.model.init(key, batch, train=False)
        return {name: made[name] for name in ("params", "batch_stats") if name in made}

    variables = nn.meta.unbox(init(jax.random.key(seed)))
    text = experiment.config.text
    if text.weights and text.tower == "clip":
        words, vision = clip_weights.load_clip(Path(text.weights).expanduser())
        variables["params"]["text"]["tower"] = words
        if "vision_tower" in variables["params"].get("image", {}):
            variables["params"]["image"]["vision_tower"] = vision
    elif text.weights and text.tower == "siglip":
        variables["params"]["text"]["tower"] = siglip_weights.load_siglip(Path(text.weights).expanduser())
    elif text.weights:
        folder = bert_weights.find_folder(text.weights)
        variables["params"]["text"]["tower"] = bert_weights.load_bert(folder)
    variables.setdefault("batch_stats", {})
    return {name: variables[name] for name in ("params", "batch_stats")}


def abstract_variables(experiment: Experiment) -> dict[str, Any]:
    """Shapes and dtypes of `init_variables`, without computing or reading weights."""
    batch = dummy_batch(experiment)
    shapes = jax.eval_shape(lambda: experiment.model.init(jax.random.key(0), batch, train=False))
    return {name: dict(shapes).get(name, {}) for name in ("params", "batch_stats")}


def vector_size(experiment: Experiment) -> int:
    """Numbers in the model's vectors, without computing or reading weights."""
    batch, model = dummy_batch(experiment), experiment.model
    (images, _), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), batch, train=False))
    return int(images.vector.shape[1])
