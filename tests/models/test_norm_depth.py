"""Every model declares how many BatchNorms lie behind each other: neither fewer, which is wrong, nor more, which costs.

3SHNet's are followed through whole gradients in tests/train/test_microbatch.py.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from shnet_jax import registry
from shnet_jax.models import user
from shnet_jax.training.microbatch import Splitting, embed_in_parts
from tests.models import test_cmsei
from tests.models.test_shnet import compiled, random_variables
from tests.train import test_parallel_models as models
from tests.train import test_parallel_step as whole_model
from tests.train.test_microbatch import agree

PARTS = 2
BOTH = ("regions", "grid")
NORMED = [
    ("user", {}),
    ("user", {"model.user.norm": "layer", "model.user.guides": ("sge", "cge"), "model.units": BOTH}),
    ("user", {"model.user.guides": ("cge",)}),
    ("user", {"model.user.guides": ()}),
    ("esa", {"model.units": BOTH}),
]


def build(name, changes):
    config = models.configuration(name, False)
    config.update_from_flattened_dict(changes)
    return registry.model(name).build(config)


def batch():
    rng = np.random.default_rng(4)
    given = {"grid": rng.normal(size=(whole_model.IMAGES, 2, 6)), "image_embedding": rng.normal(size=(8, 8))}
    return whole_model.batch() | {name: values.astype(np.float32) for name, values in given.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", NORMED, ids=str)
def test_statistics_of_the_whole_batch_take_as_many_passes(monkeypatch, name, changes):
    monkeypatch.setattr(user, "SLOTS", whole_model.REGIONS)
    model = build(name, changes)
    values = random_variables(model, batch(), method="encode_image")
    assert model.norm_depth

    def encode(mutable, params, part, key, given):
        del key
        found = {"params": params, "batch_stats": values["batch_stats"], "given_moments": given}
        image, updated = model.apply(found, part, train=True, method="encode_image", mutable=[mutable])
        return (image, image), updated[mutable]

    def in_parts(depth):
        def part(*inputs):
            return encode("moments", *inputs)

        statistics = "exact" if depth else "local"
        rest = Splitting(PARTS, statistics, depth)
        return embed_in_parts(part, values["params"], values["batch_stats"], batch(), jax.random.key(0), rest)

    @compiled
    def all_of_them():
        whole = encode("batch_stats", values["params"], batch(), None, {})
        return whole, in_parts(model.norm_depth), in_parts(model.norm_depth - 1)

    ((wanted, _), stats), ((found, _), ours), ((fewer, _), _) = all_of_them()
    agree((found.vector, ours), (wanted.vector, stats))
    with pytest.raises(AssertionError):
        agree(fewer.vector, wanted.vector)


@pytest.mark.parametrize("name", ["esa", "cmsei", "cmsei without attention", "cmsei with geometry"])
def test_a_model_that_declares_none_has_none(name):
    own, given = (
        {"cmsei": {}, "cmsei without attention": {"attend": ()}, "cmsei with geometry": {"geometry_heads": 2}},
        {},
    )
    if name == "esa":
        model, given = build("esa", {"model.esa.head": "none", "model.units": ("grid",), "text.projection": 8}), batch()
        given["grid"] = np.zeros((8, 2, 8), np.float32)
    else:
        model, given = registry.model("cmsei").build(test_cmsei.config(**own[name])), test_cmsei.batch()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), given, train=False))
    assert model.norm_depth == 0 and not shapes.get("batch_stats")
