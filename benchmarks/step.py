"""The training step, and the image tower alone, at published sizes: utilisation, and bfloat16 against float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from benchmarks.flops import image_training_flops, step_flops
from benchmarks.product import Product, best_product
from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from configs import base
from shnet_jax import registry
from shnet_jax.data.batches import gather
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import make_mesh, put_batch, replicate
from shnet_jax.plan.planned_run import describe, random_batch
from shnet_jax.training.setup import build_step
from shnet_jax.types import Batch

DTYPES = ("float32", "bfloat16")
VOCABULARY = 30522  # BERT-base uncased
SHAPES = {"regions": (36, 2048), "seg_semantic": (133, 7, 7), "seg_map": (64, 64), "categories": (133,)}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """pairs, tokens: of the step's batch; images: of the image tower's. layers: of BERT."""

    pairs: int = 32
    tokens: int = 16
    images: int = 64
    layers: int = 12
    rounds: int = 5


FULL = Sizes()
QUICK = Sizes(pairs=4, images=4, layers=2, rounds=2)
GPU = Sizes(pairs=256, images=256)


def configuration(dtype: str, layers: int) -> FrozenConfigDict:
    """The published model on one device; the warm-up of its loss is part of the program."""
    c: ConfigDict = base.get_config()
    c.model.dtype = c.text.dtype = dtype
    c.text.vocab_size, c.text.layers = VOCABULARY, layers
    c.parallel.devices = 1
    return FrozenConfigDict(c)


def host_batch(config: FrozenConfigDict, pairs: int, tokens: int) -> dict[str, np.ndarray]:
    """A random batch as it comes from the data set: features in float16, no padding."""
    fixed = ConfigDict(config.to_dict())
    fixed.data.max_tokens, fixed.data.token_buckets = tokens, (tokens,)
    return random_batch(describe(fixed), pairs, 0)


class Steps:
    """Steps one after another, past the warm-up of the loss; the state of one goes into the next."""

    def __init__(self, config: FrozenConfigDict, model: RetrievalModel, variables: Any, host: dict[str, np.ndarray]):
        mesh = make_mesh(1)
        shapes = jax.eval_shape(lambda: variables)
        built = build_step(config, model, mesh, shapes, steps_per_epoch=1000, total_steps=25_000)
        self._step, self._batch = built.step, put_batch(host, mesh)
        after: Any = replicate(np.int32(1000 * config.loss.triplet.warmup_epochs), mesh)
        self._state = dataclasses.replace(built.first_state(variables), step=after)

    def __call__(self) -> Any:
        """One step; its metrics."""
        self._state, metrics = self._step(self._state, self._batch, {})
        return metrics


def image_gradient(model: RetrievalModel, variables: Any, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """Forward and backward pass of the image tower, as in training."""

    @jax.jit
    def gradient(params: Any, batch: Batch) -> Any:
        def value(params: Any) -> Any:
            embedding, _ = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                gather({}, batch),
                train=True,
                method="encode_image",
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return jnp.sum(embedding.vector[:, ::2])  # any direction in which a unit vector may change

        return jax.grad(value)(params)

    # The tower's own parameters: gradients of the text tower would be large arrays of zeros.
    return partial(gradient, {"image": variables["params"]["image"]}, jax.device_put(batch))


def measured_calls(
    sizes: Sizes, configs: dict[str, FrozenConfigDict], products: dict[str, Product]
) -> dict[str, Callable[[], Any]]:
    """The calls to time, by "KIND DTYPE": a step, the image tower's gradient and the fastest matrix product."""
    models = {dtype: registry.model(config.model.name).build(config) for dtype, config in configs.items()}
    host = host_batch(configs["float32"], sizes.pairs, sizes.tokens)
    fields = ("image_index", "regions", "region_mask", "seg_semantic", "seg_map", "categories")
    images = {
        name: values for name, values in host_batch(configs["float32"], sizes.images, 2).items() if name in fields
    }
    init = jax.jit(lambda key, batch: models["float32"].init(key, gather({}, batch), train=False))
    variables = init(jax.random.key(0), {name: values[:1] for name, values in host.items()})
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in DTYPES:
        calls[f"step {dtype}"] = Steps(configs[dtype], models[dtype], variables, host)
        calls[f"image {dtype}"] = image_gradient(models[dtype], variables, images)
        calls[f"product {dtype}"] = products[dtype].call
    return calls


def run(sizes: Sizes) -> list[Row]:
    """Measures each dtype against the fastest matrix product of that dtype, and bfloat16 against float32."""
    configs = {dtype: configuration(dtype, sizes.layers) for dtype in DTYPES}
    products = {dtype: best_product(dtype) for dtype in DTYPES}
    times = interleave(measured_calls(sizes, configs, products), sizes.rounds)

    on_cpu = jax.default_backend() == "cpu"
    aims = {"float32": 0.9} if on_cpu else {"bfloat16": 0.5}
    flops = step_flops(configs["float32"], SHAPES, sizes.tokens, sizes.pairs)
    image = sizes.images * image_training_flops(configs["float32"].model, SHAPES)
    rows = []
    for kind, name, work in (
        ("step", f"train step, {sizes.pairs} pairs, BERT of {sizes.layers} layers, {sizes.tokens} tokens", flops),
        ("image", f"image tower with gradient, {sizes.images} images", image),
    ):
        rows += [
            compare(
                "step",
                f"{name}, {dtype}",
                times[f"{kind} {dtype}"],
                f"{dtype} product of {products[dtype].size} x {products[dtype].size} matrices",
                times[f"product {dtype}"],
                work=work,
                reference_work=products[dtype].flops,
                unit="operations of the published model",
                aim=aims.get(dtype) if kind == "step" else None,
                note=f"{work / times[f'{kind} {dtype}'].median / 1e9:.4g} of "
                f"{products[dtype].flops / times[f'product {dtype}'].median / 1e9:.4g} GFLOP/s",
            )
            for dtype in DTYPES
        ]
        examples = sizes.pairs if kind == "step" else sizes.images
        rows.append(
            compare(
                "step",
                f"{name}, bfloat16",
                times[f"{kind} bfloat16"],
                "the same in float32",
                times[f"{kind} float32"],
                work=examples,
                unit="examples",
                aim=3.0 if on_cpu and kind == "step" else None,
                note=f"{examples / times[f'{kind} bfloat16'].median:.4g} against "
                f"{examples / times[f'{kind} float32'].median:.4g} examples/s",
            )
        )
    return rows
