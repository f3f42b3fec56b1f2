"""Losses written down once more, densely, in float64 NumPy, and their gradients by central differences."""

import numpy as np


def triplet(scores, ids, *, margin, warm, mean, mask, rank=1, softness=0, queues=None):
    """scores [B, B], images in rows; queues: see `_queued`."""

    def direction(own, scores, negatives):
        wrong = np.where(negatives, scores, -np.inf)
        if warm:
            return np.maximum(0, margin + wrong - own[:, None]).sum()
        negative = softness * np.log(np.exp(wrong / softness).sum(1)) if softness else np.sort(wrong, 1)[:, -rank]
        return np.maximum(0, margin + negative - own).sum()

    total = sum(direction(*each) for each in _directions(scores, ids, mask) + _queued(queues, ids, mask))
    return total / len(ids) if mean else total


def sigmoid(scores, ids, *, scale, bias, mask):
    """scores [B, B], images in rows."""
    logits = scale * np.asarray(scores, np.float64) + bias
    each = np.where(_negatives(ids, mask), np.log1p(np.exp(logits)), 0) + np.diag(np.log1p(np.exp(-np.diag(logits))))
    return each.sum() / len(ids)


def sigmoid_matrix(scores, ids, *, scale, bias, mask, reduction):
    """scores [N, C N] of images, in rows, with C captions in a row of each; ids [N] of the images."""
    images, texts = scores.shape
    captions = texts // images
    own = np.repeat(np.eye(images, dtype=bool), captions, axis=1)
    other = ~own & (np.asarray(ids)[:, None] != np.repeat(ids, captions) if mask else True)
    logits = scale * np.asarray(scores, np.float64) + bias
    positive, negative = np.logaddexp(0, -logits)[own].sum(), np.logaddexp(0, logits)[other].sum()
    if reduction == "queries":  # every image stands in the batch once for each of its captions
        return (positive + captions * negative) / texts
    return (positive + negative) / (images * texts)


def infonce(scores, ids, *, scale, mask, queues=None):
    """scores [B, B], images in rows; queues: see `_queued`."""
    total = 0.0
    for own, against, negatives in _directions(scores, ids, mask) + _queued(queues, ids, mask):
        own = np.exp(scale * own)
        total -= np.log(own / (own + (negatives * np.exp(scale * against)).sum(1))).sum() / (2 * len(ids))
    return total


def uto(scores, ids, *, scale, offset, weight, mask, queues=None):
    """(in-batch part, part of the queues); queues: see `_queued`."""

    def soft(scores, negatives):
        return np.log1p((negatives * np.exp(scale * (scores - offset))).sum(1)) / scale

    def reward(scores):
        return np.log1p(np.maximum(scores, 0))

    batch = -reward(np.diag(scores)).sum()
    batch += sum(soft(against, negatives).sum() for _, against, negatives in _directions(scores, ids, mask))
    held = _queued(queues, ids, mask)
    queue = sum((soft(against, negatives) - reward(own)).sum() for own, against, negatives in held)
    return weight * batch / len(ids), queue / len(ids)


def _directions(scores, ids, mask):
    """[(own [B], scores [B, B], which are negatives [B, B])] of images, then of texts."""
    scores = np.asarray(scores, np.float64)
    return [(np.diag(against), against, _negatives(np.asarray(ids), mask)) for against in (scores, scores.T)]


def _queued(queues, ids, mask):
    """The same against queues [B, K].

    queues: None or, of images, then of texts: (scores [B] with the keys of their partners, scores [B, K] with the other
    modality's queue, its image ids [K]).
    """
    ids = np.asarray(ids)
    return [(own, against, (ids[:, None] != of) | (not mask)) for own, against, of in queues or ()]


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
