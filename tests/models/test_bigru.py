from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.models.bigru import BiGRU
from tests.models import text_oracle as oracle


def test_each_direction_runs_over_the_true_length():
    model = BiGRU(vocab_size=20, width=10)
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(1, 20, (4, 6)), (6, 2, 1, 4)
    mask = jnp.arange(6) < jnp.asarray(lengths)[:, None]
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, mask, train=False))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0.0, 0.3, p.shape), jnp.float32), params)
    out = np.asarray(jax.jit(partial(model.apply, train=False))({"params": params}, tokens, mask))
    assert out.shape == (4, 6, 10)
    for i, length in enumerate(lengths):
        x = np.asarray(params["words"], np.float64)[tokens[i, :length]]
        backward = oracle.gru(x[::-1], params["backward"])[::-1]
        expected = np.concatenate([oracle.gru(x, params["forward"]), backward], axis=-1)
        np.testing.assert_allclose(out[i, :length], expected, rtol=1e-4, atol=1e-5)
        assert not out[i, length:].any()


def test_the_width_must_be_even():
    tokens = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"width 7 .* odd"):
        BiGRU(vocab_size=5, width=7).init(jax.random.key(0), tokens, tokens > 0, train=False)
