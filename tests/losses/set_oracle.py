"""The losses of sets and identities, written down once more, densely, in float64 NumPy."""

import numpy as np

from tests.ops.test_set_similarity import oracle as similarity


def scores(images, texts, eta, kind="smooth_chamfer", sharpness=16.0):
    """images, texts: (vectors [B, d], elements [B, M, d]); -> [B, B]."""
    masks = [np.ones(side[1].shape[:2], bool) for side in (images, texts)]
    return images[0] @ texts[0].T + eta * similarity(images[1], masks[0], texts[1], masks[1], kind, sharpness)


def asm(scores, meaning, ids, *, margin, sign, scale):
    """meaning: (image vectors, text vectors) as constants."""
    close = np.clip((meaning[0] @ meaning[0].T + meaning[1] @ meaning[1].T) / 2, 0, 1)
    widened = margin * (1 + sign * scale * close) + scores
    widened = np.where(ids[:, None] == ids[None], -np.inf, widened)
    own = np.diag(scores)
    return (np.maximum(widened.max(1) - own, 0).sum() + np.maximum(widened.max(0) - own, 0).sum()) / len(ids)


def sdm(cosines, ids, *, temperature):
    """As IRRA's compute_sdm."""
    wanted = (ids[:, None] == ids[None]).astype(np.float64)
    wanted /= wanted.sum(1, keepdims=True)

    def direction(logits):
        log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log_p -= logits.max(1, keepdims=True)
        return (np.exp(log_p) * (log_p - np.log(wanted + 1e-8))).sum(1).mean()

    return direction(cosines / temperature) + direction(cosines.T / temperature)


def identity(images, texts, ids, kernel, bias):
    def side(x):
        logits = x @ kernel + bias
        return (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(ids)), ids]).mean()

    return (side(images) + side(texts)) / 2


def diversity(images, texts, *, sharpness, gamma):
    """images, texts: (vectors, elements)."""

    def repulsion(vectors, elements):
        rest = elements - np.einsum("nmd,nd->nm", elements, vectors)[..., None] * vectors[:, None]
        rest /= np.linalg.norm(rest, axis=-1, keepdims=True)
        squares = ((rest[:, :, None] - rest[:, None]) ** 2).sum(-1)
        off = ~np.eye(elements.shape[1], dtype=bool)
        return np.exp(-sharpness * squares)[:, off].mean()

    def kernel(a, b):
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        return np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(-1)).mean()

    v, t = images[1], texts[1]
    apart = (repulsion(*images) + repulsion(*texts)) / 2
    return apart + kernel(v, v) - 2 * kernel(v, t) + kernel(t, t)
