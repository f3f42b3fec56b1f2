"""The text towers' equations in NumPy float64, one caption at a time and with loops where that is plainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Params = Mapping[str, Any]


def dense(x: np.ndarray, p: Params) -> np.ndarray:
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def layer_norm(x: np.ndarray, p: Params, epsilon: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred / scale * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(x: np.ndarray, p: Params, heads: int) -> np.ndarray:
    """x [L, width], all members valid."""
    size = x.shape[-1] // heads
    query, key, value = (dense(x, p[name]) for name in ("query", "key", "value"))
    parts = []
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        parts.append(softmax(query[:, at] @ key[:, at].T / math.sqrt(size)) @ value[:, at])
    return dense(np.concatenate(parts, axis=-1), p["out"])


def mlp(x: np.ndarray, p: Params) -> np.ndarray:
    hidden = dense(x, p["in"])
    return dense(hidden * 0.5 * (1.0 + np.vectorize(math.erf)(hidden / math.sqrt(2.0))), p["out"])


def gru(x: np.ndarray, p: Params) -> np.ndarray:
    """x [L, i] -> states [L, hidden], first row first."""
    w_input, b_input, w_hidden, b_hidden = (
        np.asarray(p[n], np.float64) for n in ("input_kernel", "input_bias", "hidden_kernel", "hidden_bias")
    )

    def sigmoid(a: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + np.exp(-a))

    state, states = np.zeros(len(w_hidden)), []
    for row in x:
        r_x, z_x, n_x = np.split(row @ w_input + b_input, 3)
        r_h, z_h, n_h = np.split(state @ w_hidden + b_hidden, 3)
        new = np.tanh(n_x + sigmoid(r_x + r_h) * n_h)
        update = sigmoid(z_x + z_h)
        state = (1 - update) * new + update * state
        states.append(state)
    return np.stack(states)
