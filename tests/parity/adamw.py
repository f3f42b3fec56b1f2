"""How far the rounding of gradients moves parameters under AdamW, and so how closely they can be compared."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from tests.parity.compare import TIMES

GRADIENT_ROUNDING = 1e-4
"""Error of a gradient element that counts as rounding, as a share of the largest element of its row or its column, the
smaller one.

By their `ref_err` the recorded gradients of the image encoder have errors of up to 1.6e-5 of their largest element, and
the checks ask for ten times the reference's own error. Arrays whose true gradient is zero are apart from this
(`tolerance`). In the recorded runs 0.3 % of the elements get more than twice the tolerance of all others by it.
"""


def slack(opt_state: Any, steps: int, before: Any = None) -> Any:
    """Bounds on how far rounding moves each parameter in `steps` steps: a tree of arrays in units of the learning rate.

    The update is u = m / (r + eps), where m and r = sqrt(v) are the bias-corrected moments. Each is a mean of the
    gradients so far, r a quadratic one. An error of at most d in every gradient changes either by at most d, and u by
    at most (1 + |u|) d / (r - d + eps). This is next to nothing where gradients are far above their rounding, and up to
    2, a step in the other direction, where they are not. An element without any gradient does not move.

    Args:
      opt_state: optimiser state after step number `steps` (1: the first).
      before: the bounds after the step before that, which these are added to.
    """

    def bound(mu: jax.Array, nu: jax.Array, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> np.ndarray:
        m, r = np.asarray(mu, np.float64) / (1 - b1**steps), np.sqrt(np.asarray(nu, np.float64) / (1 - b2**steps))
        column, row = (r.max(axis, keepdims=True, initial=0.0) for axis in (tuple(range(r.ndim - 1)) or None, -1))
        d = GRADIENT_ROUNDING * np.minimum(column, row)
        change = (1 + np.abs(m) / (r + eps)) * d / (np.maximum(r - d, 0.0) + eps)
        return np.where(r == 0, 0.0, np.minimum(change, 2.0))

    bounds = jax.tree.map(bound, *(optax.tree_utils.tree_get(opt_state, name) for name in ("mu", "nu")))
    return bounds if before is None else jax.tree.map(np.add, before, bounds)


def tolerance(
    rate: float, steps: int, slack: np.ndarray, rounding: float, *, zero_gradient: bool
) -> np.ndarray | float:
    """Tolerance of each element of a parameter after `steps` steps at the learning rate `rate`.

    A fifth of the rate, or `TIMES` the reference's own error if that is more, and what rounding of the gradient may add
    (`slack`). With zero_gradient, for arrays whose true gradient is zero, every step follows rounding noise.
    """
    if zero_gradient:
        return rate * steps
    return np.minimum(np.maximum(rate / 5, TIMES * rounding) + rate * slack, 2 * rate * steps)
