"""Images and captions embedded a second by the towers of the published model, features sent from the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from benchmarks.flops import image_flops, text_flops
from benchmarks.product import best_product
from benchmarks.rows import Row, compare
from benchmarks.step import DTYPES, SHAPES, configuration, host_batch
from benchmarks.timing import interleave
from shnet_jax import registry
from shnet_jax.data.batches import gather
from shnet_jax.evaluation.encode import image_tower, text_tower
from shnet_jax.parallel.mapping import make_mesh, map_encode, put_batch, replicate

TEXTS = ("tokens", "token_mask")
SIDES = {"images": image_tower, "captions": text_tower}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """batch: images, and captions, embedded at once. tokens: of a caption. layers: of BERT."""

    batch: int = 128
    tokens: int = 16
    layers: int = 12
    rounds: int = 5


FULL = Sizes()
QUICK = Sizes(batch=4, layers=2, rounds=1)
GPU = Sizes(batch=512)


def run(sizes: Sizes) -> list[Row]:
    """Each side in float32 and bfloat16 against the fastest matrix product of that dtype."""
    configs = {dtype: configuration(dtype, sizes.layers) for dtype in DTYPES}
    host, mesh = host_batch(configs["float32"], sizes.batch, sizes.tokens), make_mesh(1)
    halves: dict[str, dict[str, Any]] = {"images": {}, "captions": {}}
    for name, values in host.items():
        halves["captions" if name in TEXTS else "images"][name] = values
    models = {dtype: registry.model(config.model.name).build(config) for dtype, config in configs.items()}
    init = jax.jit(lambda key, batch: models["float32"].init(key, gather({}, batch), train=False))
    variables = replicate(init(jax.random.key(0), {name: values[:1] for name, values in host.items()}), mesh)
    products = {dtype: best_product(dtype) for dtype in DTYPES}
    calls: dict[str, Callable[[], Any]] = {f"product {dtype}": product.call for dtype, product in products.items()}

    def embed(encode: Callable[..., Any], side: str) -> Any:
        return encode(variables, put_batch(halves[side], mesh))

    for dtype in DTYPES:
        for side, tower in SIDES.items():
            encode = map_encode(partial(tower, models[dtype]), mesh)
            calls[f"{side} {dtype}"] = partial(embed, encode, side)
    times = interleave(calls, sizes.rounds)
    config = configs["float32"]
    operations = {
        "images": sum(image_flops(config.model, SHAPES).values()),
        "captions": sum(text_flops(config.text, config.model.dim, sizes.tokens).values()),
    }
    return [
        compare(
            "embed",
            f"{sizes.batch} {side} embedded, {dtype}",
            times[f"{side} {dtype}"],
            f"{dtype} product of {products[dtype].size} x {products[dtype].size} matrices",
            times[f"product {dtype}"],
            work=sizes.batch * each,
            reference_work=products[dtype].flops,
            unit="operations of the published model",
            note=f"{sizes.batch / times[f'{side} {dtype}'].median:.4g} {side}/s",
        )
        for dtype in DTYPES
        for side, each in operations.items()
    ]
