"""Losses written down once more, densely, in float64 NumPy, and their gradients by central differences."""

import numpy as np


def triplet(scores, ids, *, margin, warm, mean, mask, rank=1, softness=0, queues=None):
    """scores [B, B], images in rows; queues: see `_directions`."""

    def direction(own, scores, negatives):
        wrong = np.where(negatives, scores, -np.inf)
        if warm:
            return np.maximum(0, margin + wrong - own[:, None]).sum()
        negative = softness * np.log(np.exp(wrong / softness).sum(1)) if softness else np.sort(wrong, 1)[:, -rank]
        return np.maximum(0, margin + negative - own).sum()

    total = sum(direction(*each) for each in _directions(scores, ids, mask, queues))
    return total / len(ids) if mean else total


def sigmoid(scores, ids, *, scale, bias, mask):
    """scores [B, B], images in rows."""
    logits = scale * np.asarray(scores, np.float64) + bias
    each = np.where(_negatives(ids, mask), np.log1p(np.exp(logits)), 0) + np.diag(np.log1p(np.exp(-np.diag(logits))))
    return each.sum() / len(ids)


def infonce(scores, ids, *, scale, mask, queues=None):
    """scores [B, B], images in rows; queues: see `_directions`."""
    total = 0.0
    for own, against, negatives in _directions(scores, ids, mask, queues):
        own = np.exp(scale * own)
        total -= np.log(own / (own + (negatives * np.exp(scale * against)).sum(1))).sum() / (2 * len(ids))
    return total


def uto(scores, ids, *, scale, offset, weight, mask, queues=None, partners=None):
    """(in-batch part, part of the queues); partners: scores [B] of images with their text keys, and of texts."""

    def soft(scores, negatives):
        return np.log1p((negatives * np.exp(scale * (scores - offset))).sum(1)) / scale

    def reward(scores):
        return np.log1p(np.maximum(scores, 0))

    batch = -reward(np.diag(scores)).sum()
    queue = 0.0
    for side, (_, against, negatives) in enumerate(_directions(scores, ids, mask, queues)):
        size = len(ids)
        batch += soft(against[:, :size], negatives[:, :size]).sum()
        if queues is not None:
            queue += (soft(against[:, size:], negatives[:, size:]) - reward(partners[side])).sum()
    return weight * batch / len(ids), queue / len(ids)


def _directions(scores, ids, mask, queues):
    """[(own [B], scores [B, M], which are negatives [B, M])] of images, then of texts; M = B, and a queue's K.

    queues: ((scores [B, K] of the images with the text queue, its image ids), (of the texts with the other, ids)).
    """
    scores, ids, found = np.asarray(scores, np.float64), np.asarray(ids), []
    for side, against in enumerate((scores, scores.T)):
        own, negatives = np.diag(against), _negatives(ids, mask)
        if queues is not None:
            further, of = queues[side]
            against = np.hstack([against, further])
            negatives = np.hstack([negatives, (ids[:, None] != of) | (not mask)])
        found.append((own, against, negatives))
    return found


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
