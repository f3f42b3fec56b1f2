from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.models.transformer import EPSILON, Transformer
from tests.models import text_oracle as oracle

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "layers": 2,
    "width": 12,
    "heads": 3,
    "mlp_dim": 20,
    "max_positions": 9,
}


def test_equals_numpy_caption_by_caption():
    model = Transformer(**SIZES)
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(1, 20, (3, 6)), (6, 2, 4)
    mask = jnp.arange(6) < jnp.asarray(lengths)[:, None]
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, mask, train=False))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0.0, 0.5, p.shape), jnp.float32), params)
    out = np.asarray(jax.jit(partial(model.apply, train=False))({"params": params}, tokens, mask))
    for i, length in enumerate(lengths):
        x = np.asarray(params["words"], np.float64)[tokens[i, :length]]
        x = x + np.asarray(params["positions"], np.float64)[:length]
        for k in range(2):
            p = params[f"layer_{k}"]
            x = x + oracle.attention(oracle.layer_norm(x, p["attention_norm"], EPSILON), p["attention"], 3)
            x = x + oracle.mlp(oracle.layer_norm(x, p["mlp_norm"], EPSILON), p["mlp"])
        expected = oracle.layer_norm(x, params["norm"], EPSILON)
        np.testing.assert_allclose(out[i, :length], expected, rtol=1e-4, atol=1e-4)


def test_captions_longer_than_the_positions_are_refused():
    tokens = jnp.ones((1, 10), jnp.int32)
    with pytest.raises(ValueError, match=r"10 tokens.*9 positions"):
        jax.eval_shape(lambda: Transformer(**SIZES).init(jax.random.key(0), tokens, tokens > 0, train=False))
