"""Losses written down once more, densely, in float64 NumPy, and their gradients by central differences."""

import numpy as np


def triplet(scores, ids, *, margin, warm, mean, mask, rank=1, softness=0):
    """scores [B, B], images in rows."""
    scores, negatives = np.asarray(scores, np.float64), _negatives(ids, mask)

    def direction(scores):
        own, wrong = np.diag(scores), np.where(negatives, scores, -np.inf)
        if warm:
            return np.maximum(0, margin + wrong - own[:, None]).sum()
        negative = softness * np.log(np.exp(wrong / softness).sum(1)) if softness else np.sort(wrong, 1)[:, -rank]
        return np.maximum(0, margin + negative - own).sum()

    total = direction(scores) + direction(scores.T)
    return total / len(ids) if mean else total


def sigmoid(scores, ids, *, scale, bias, mask):
    """scores [B, B], images in rows."""
    logits = scale * np.asarray(scores, np.float64) + bias
    each = np.where(_negatives(ids, mask), np.log1p(np.exp(logits)), 0) + np.diag(np.log1p(np.exp(-np.diag(logits))))
    return each.sum() / len(ids)


def infonce(scores, ids, *, scale, mask):
    """scores [B, B], images in rows."""
    size = len(ids)
    kept = (_negatives(ids, mask) | np.eye(size, dtype=bool)) * np.exp(scale * np.asarray(scores, np.float64))
    own = np.diag(kept)
    return -(np.log(own / kept.sum(1)).sum() + np.log(own / kept.sum(0)).sum()) / (2 * size)


def _negatives(ids, mask):
    return np.array([[i != j and not (mask and ids[i] == ids[j]) for j in range(len(ids))] for i in range(len(ids))])


def gradient(f, x, step=1e-6):
    """df/dx of a scalar function of one float64 array."""
    x = np.array(x, np.float64)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        out[i] = (f(up) - f(down)) / (2 * step)
    return out


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
