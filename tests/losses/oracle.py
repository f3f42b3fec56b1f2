"""Losses written down once more, densely, in float64 NumPy, and their gradients by central differences."""

import numpy as np


def triplet(scores, ids, *, margin, warm, mean, mask):
    """scores [B, B], images in rows."""
    scores, negatives = np.asarray(scores, np.float64), _negatives(ids, mask)
    own = np.diag(scores)
    images = negatives * np.maximum(0, margin + scores - own[:, None])
    texts = negatives * np.maximum(0, margin + scores - own[None, :])
    total = images.sum() + texts.sum() if warm else images.max(1).sum() + texts.max(0).sum()
    return total / len(ids) if mean else total


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
