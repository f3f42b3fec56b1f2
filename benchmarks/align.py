"""A training step of heads on frozen features, against the same step written plainly in PyTorch.

Both read rows of made vectors in float16, apply star heads on both sides, the sigmoid loss over all entries, and Lion.
Each runs in processes of its own, in turns; PyTorch is needed for the reference alone: pip install torch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import resident
from benchmarks.rows import Row, compare
from benchmarks.timing import Timing
from configs import align

LR, DECAY, BETAS, SCALE, BIAS = 1e-5, 1e-4, (0.9, 0.99), 20.0, -10.0
WIDTH = 8  # of star
SAME = {"float32": 2e-4, "bfloat16": 2e-2}
"""Relative difference from the losses of float32 PyTorch that is taken for rounding, by our operands."""
AIM = {"float32": 2.0, "bfloat16": 4.0}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """pairs: made vectors. width: of a vector. dim: of the joint space. batch: pairs of a step. microbatch, tile: ours.

    steps: timed in a process, after one that is not. rounds: processes of each, in turns.
    """

    pairs: int = 1_000_000
    width: int = 1024
    dim: int = 1024
    batch: int = 32768
    microbatch: int = 4096
    tile: int = 4096
    steps: int = 2
    rounds: int = 2


FULL = Sizes()
QUICK = Sizes(pairs=20_000, width=64, dim=64, batch=2048, microbatch=512, tile=512, rounds=1)


def vectors(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Made vectors of images and texts, [pairs, width] float16, a few thousand rows that repeat."""
    rng = np.random.default_rng(0)
    sides = (rng.standard_normal((min(sizes.pairs, 4096), sizes.width), np.float32) for _ in range(2))
    images, texts = (np.resize(side.astype(np.float16), (sizes.pairs, sizes.width)) for side in sides)
    return images, texts


def weights(sizes: Sizes) -> dict[str, dict[str, np.ndarray]]:
    """Equal first weights of both, [in, out] by side and layer; Xavier-uniform."""
    rng = np.random.default_rng(1)
    hidden = WIDTH * sizes.width
    shapes = {"f1": (sizes.width, hidden), "f2": (sizes.width, hidden), "g": (hidden, sizes.dim)}

    def drawn(shape: tuple[int, int]) -> np.ndarray:
        return (rng.random(shape, np.float32) * 2 - 1) * np.sqrt(6 / sum(shape), dtype=np.float32)

    return {side: {name: drawn(shape) for name, shape in shapes.items()} for side in ("image", "text")}


def ours(sizes: Sizes, dtype: str = "float32") -> Callable[[np.ndarray, np.ndarray], float]:
    """The step of this project, of two blocks of rows -> the loss. dtype: operands of products."""
    import jax

    from shnet_jax import registry
    from shnet_jax.parallel.mapping import make_mesh, put_batch
    from shnet_jax.training.setup import build_step

    c = align.get_config("sail")
    c.model.dim, c.model.dtype, c.text.dtype, c.loss.pairs.dtype = sizes.dim, dtype, dtype, dtype
    c.train.batch_size, c.train.microbatch, c.loss.pairs.tile = sizes.batch, sizes.microbatch, sizes.tile
    model, mesh = registry.model("align").build(c), make_mesh(1)
    one = np.zeros((1, sizes.width), np.float32)
    example = {"image_index": np.zeros(1, np.int32), "image_embedding": one, "caption_embeddings": one}
    params: Any = jax.device_get(jax.jit(lambda: model.init(jax.random.key(0), example, train=False))()["params"])
    for side, layers in weights(sizes).items():
        for name, kernel in layers.items():
            params[side]["head"][name]["kernel"] = kernel
    variables = {"params": params, "batch_stats": {}}
    setup = build_step(c, model, mesh, variables, 10, 100)
    state = [setup.first_state(variables)]
    index = np.arange(sizes.batch, dtype=np.int32)

    def step(images: np.ndarray, texts: np.ndarray) -> float:
        batch = {"image_index": index, "image_embedding": images, "caption_embeddings": texts}
        state[0], metrics = setup.step(state[0], put_batch(batch, mesh), {})
        return float(metrics["loss"])

    return step


def plain(sizes: Sizes) -> Callable[[np.ndarray, np.ndarray], float]:
    """The same in PyTorch, with the whole score matrix."""
    import torch
    from torch.nn import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"

    class Star(torch.nn.Module):
        f1: torch.nn.Linear
        f2: torch.nn.Linear
        g: torch.nn.Linear

        def __init__(self, layers: dict[str, np.ndarray]):
            super().__init__()
            self.norm = torch.nn.LayerNorm(sizes.width)
            for name, kernel in layers.items():
                layer = torch.nn.Linear(*kernel.shape)
                layer.weight.data, layer.bias.data = torch.from_numpy(kernel.T.copy()), torch.zeros(kernel.shape[1])
                setattr(self, name, layer)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            one, two = self.f1(x).clamp(-1e3, 1e3), self.f2(x).clamp(-1e3, 1e3)
            return functional.normalize(self.g(functional.relu6(one) * two), dim=-1)

    heads = torch.nn.ModuleDict({side: Star(layers) for side, layers in weights(sizes).items()}).to(device)
    scale, bias = (torch.nn.Parameter(torch.tensor(x, device=device)) for x in (float(np.log(SCALE)), BIAS))
    parameters = [*heads.parameters(), scale, bias]
    averages = [torch.zeros_like(p) for p in parameters]
    labels = 2 * torch.eye(sizes.batch, device=device) - 1

    def step(images: np.ndarray, texts: np.ndarray) -> float:
        sides = (torch.from_numpy(x).to(device).float() for x in (images, texts))
        embedded = [head(x) for head, x in zip(heads.values(), sides, strict=True)]
        logits = scale.exp() * embedded[0] @ embedded[1].T + bias
        loss = -functional.logsigmoid(labels * logits).mean()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g, m in zip(parameters, gradients, averages, strict=True):
                p.sub_(LR * (torch.sign(BETAS[0] * m + (1 - BETAS[0]) * g) + DECAY * p))
                m.mul_(BETAS[1]).add_(g, alpha=1 - BETAS[1])
            scale.clamp_(0.0, float(np.log(100.0)))
        return float(loss.detach())

    return step


STEPS: dict[str, Callable[[Sizes], Callable[[np.ndarray, np.ndarray], float]]] = {
    "float32": ours,
    "bfloat16": partial(ours, dtype="bfloat16"),
    "plain": plain,
}


def child(name: str, sizes: Sizes) -> dict[str, Any]:
    """Seconds of each step, losses, and the peak of this process in bytes above that of its data."""
    images, texts = vectors(sizes)
    rng = np.random.default_rng(2)
    before = resident.bytes_of("self", "VmRSS")
    step = STEPS[name](sizes)
    seconds, losses = [], []
    for _ in range(1 + sizes.steps):
        rows = rng.integers(0, sizes.pairs, sizes.batch)
        start = time.perf_counter()
        losses.append(step(images[rows], texts[rows]))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "losses": losses, "peak": resident.bytes_of("self", "VmHWM") - before}


def run(sizes: Sizes) -> list[Row]:
    """A row for each dtype; without PyTorch they say so. RuntimeError where a loss is not that of PyTorch."""
    description = f"step of {sizes.batch} pairs, {sizes.width} -> {sizes.dim}, star heads, "
    if importlib.util.find_spec("torch") is None:
        return [
            Row("align", description + dtype, "plain PyTorch", note="no PyTorch here: pip install torch")
            for dtype in AIM
        ]
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in STEPS}
    for _ in range(sizes.rounds):
        for name in STEPS:
            measured[name].append(_process(name, sizes))
    times = {name: Timing(tuple(s for each in runs for s in each["seconds"])) for name, runs in measured.items()}
    peaks = {name: max(each["peak"] for each in runs) for name, runs in measured.items()}
    rates = {name: sizes.batch / timing.median for name, timing in times.items()}
    rows = []
    for dtype, aim in AIM.items():
        one, other = (np.array(measured[name][0]["losses"]) for name in (dtype, "plain"))
        if not np.allclose(one, other, rtol=SAME[dtype]):
            raise RuntimeError(f"{dtype}: losses differ: {one.tolist()} and {other.tolist()}")
        rows.append(
            compare(
                "align",
                description + dtype,
                times[dtype],
                "plain PyTorch, float32",
                times["plain"],
                work=sizes.batch,
                unit="pairs",
                aim=aim,
                memory_bytes=peaks[dtype],
                reference_memory_bytes=peaks["plain"],
                memory="peak of the process above its data",
                note=f"{rates[dtype]:.4g} against {rates['plain']:.4g} pairs/s; {sizes.pairs} made pairs",
            )
        )
    return rows


def _process(name: str, sizes: Sizes) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.align", name, json.dumps(dataclasses.asdict(sizes))]
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr[-300:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], Sizes(**json.loads(sys.argv[2])))))
