"""The formulas of the published PyTorch implementations, on the same device, against those of this project.

Losses over the whole score matrix (VSE++'s hardest negative, CLIP's InfoNCE, SigLIP's sigmoid loss) and the sorted
pooling of VSE-infinity, each with its gradient, written here from their equations. It takes `pip install torch`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import losses
from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from shnet_jax.ops.set_pool import set_pool

SAME = 1e-3
"""Relative difference of the values of both that is taken for rounding."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """pairs, dim: of the losses. sets, members: of the pooling, with `dim` channels."""

    pairs: tuple[int, ...] = (4096,)
    dim: int = 512
    sets: int = 64
    members: int = 122
    rounds: int = 3
    budget: float = 20.0


FULL = Sizes()
QUICK = Sizes(pairs=(64,), dim=32, sets=2, members=6, rounds=1)
GPU = Sizes(pairs=(4096, 16384, 32768), sets=256)


def torch_loss(name: str, images: Any, texts: Any) -> Any:
    """A loss of tensors [pairs, dim] of unit vectors whose images are all different."""
    import torch
    from torch.nn import functional

    scores = images @ texts.T
    matches = scores.diagonal()
    if name == "triplet":
        others = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -torch.inf)
        return sum(functional.relu(losses.MARGIN + others.amax(axis) - matches).sum() for axis in (0, 1))
    if name == "infonce":
        logits, number = scores / losses.TEMPERATURE, torch.arange(len(scores), device=scores.device)
        return (functional.cross_entropy(logits, number) + functional.cross_entropy(logits.T, number)) / 2
    signs = 2 * torch.eye(len(scores), device=scores.device) - 1
    return -functional.logsigmoid(signs * (losses.SCALE * scores + losses.BIAS)).sum() / len(scores)


def torch_pool(features: Any, weights: Any) -> Any:
    """Pooling of sets [sets, members, channels] by weights of the ranks [sets, members]."""
    return (features.sort(dim=1, descending=True).values * weights[..., None]).sum(dim=1)


def torch_call(function: Callable[..., Any], *arrays: np.ndarray) -> Callable[[], tuple[Any, Any]]:
    """A call that gives the value of a scalar function of tensors on the device, and its gradients; float32."""
    import torch

    on_card = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = False  # float32, as the scores of the project
    tensors = [torch.from_numpy(x).to("cuda" if on_card else "cpu").requires_grad_() for x in arrays]

    def call() -> tuple[Any, Any]:
        value = function(*tensors)
        gradients = torch.autograd.grad(value, tensors)
        if on_card:
            torch.cuda.synchronize()
        return value.detach(), gradients

    return call


def run(sizes: Sizes) -> list[Row]:
    """Rows of the losses, then of the pooling. RuntimeError where the two do not compute the same."""
    if importlib.util.find_spec("torch") is None:
        return [Row("published", "losses and pooling", "PyTorch", note="no PyTorch here: pip install torch")]
    return [row for pairs in sizes.pairs for row in _losses(sizes, pairs)] + [_pooling(sizes)]


def _losses(sizes: Sizes, pairs: int) -> list[Row]:
    rows = []
    vectors = losses.embeddings(pairs, sizes.dim)
    for name in losses.LOSSES:
        description = f"{name}, gathered, {pairs} pairs, D {sizes.dim}"
        program = losses.loss_program(name, "gathered", pairs, sizes.dim, 1)
        if not program.fits:
            rows.append(Row("published", description, "PyTorch", note=f"it needs {program.memory / 2**30:.1f} GiB"))
            continue
        reference = torch_call(partial(torch_loss, name), *vectors)
        _, (terms, _) = program.call()
        _check(description, float(np.sum(terms[f"{name}_loss"])), float(reference()[0]))
        times = interleave({"ours": program.call, "torch": reference}, sizes.rounds, budget=sizes.budget)
        rows.append(
            compare("published", description, times["ours"], _label(), times["torch"], work=pairs**2, unit="scores")
        )
    return rows


def _pooling(sizes: Sizes) -> Row:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((sizes.sets, sizes.members, sizes.dim), np.float32)
    weights = rng.random((sizes.sets, sizes.members), np.float32)
    mask = jnp.ones(weights.shape, bool)
    ours = jax.jit(jax.value_and_grad(lambda f, w: jnp.square(set_pool(f, mask, w)).mean(), argnums=(0, 1)))
    call, reference = (
        partial(ours, *jax.device_put((features, weights))),
        torch_call(lambda f, w: torch_pool(f, w).square().mean(), features, weights),
    )
    description = f"set pooling of {' x '.join(map(str, features.shape))}, gradient"
    _check(description, float(call()[0]), float(reference()[0]))
    times = interleave({"ours": call, "torch": reference}, sizes.rounds, budget=sizes.budget)
    return compare("published", description, times["ours"], _label(), times["torch"])


def _check(description: str, ours: float, other: float) -> None:
    if not np.isclose(ours, other, rtol=SAME):
        raise RuntimeError(f"{description}: {ours} here, {other} in PyTorch")


def _label() -> str:
    import torch

    return f"PyTorch {torch.__version__}, {'the same card' if torch.cuda.is_available() else 'CPU'}, float32"
