"""Cost of momentum encoders and their queues: USER's training step with them against the same step without."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from benchmarks import machine, step
from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from configs import user as user_config
from shnet_jax import registry
from shnet_jax.data.batches import gather
from shnet_jax.parallel.mapping import make_mesh, put_batch
from shnet_jax.training.setup import build_step


@dataclasses.dataclass(frozen=True)
class Sizes:
    """pairs, tokens: of the batch. layers: of BERT. queues: entries of each of the two queues."""

    pairs: int = 32
    tokens: int = 16
    layers: int = 12
    queues: tuple[int, ...] = (4096, 65536)
    rounds: int = 5


FULL = Sizes()
QUICK = Sizes(pairs=4, layers=2, rounds=2)


def configuration(sizes: Sizes, queue: int) -> FrozenConfigDict:
    """The published model on one device, bfloat16 products; queue 0: no momentum encoders."""
    c: ConfigDict = user_config.get_config()
    c.model.dtype = c.text.dtype = "bfloat16"
    c.text.vocab_size, c.text.layers = step.VOCABULARY, sizes.layers
    c.train.batch_size, c.momentum.queue = sizes.pairs, queue
    c.parallel.devices = 1
    return FrozenConfigDict(c)


class Steps:
    """Steps one after another; `memory`: bytes of their results, the new state with them, and temporaries."""

    def __init__(self, config: FrozenConfigDict, variables: Any, host: dict[str, Any]):
        mesh = make_mesh(1)
        model = registry.model(config.model.name).build(config)
        shapes = jax.eval_shape(lambda: variables)
        built = build_step(config, model, mesh, shapes, steps_per_epoch=1000, total_steps=25_000)
        self._state, self._batch = built.first_state(variables), put_batch(host, mesh)
        self._step = built.step.lower(self._state, self._batch, {}).compile()
        self.memory = machine.program_bytes(self._step)

    def __call__(self) -> Any:
        """One step; its metrics."""
        self._state, metrics = self._step(self._state, self._batch, {})
        return metrics


def run(sizes: Sizes) -> list[Row]:
    """One row for each size of the queues."""
    host = step.host_batch(configuration(sizes, 0), sizes.pairs, sizes.tokens)
    model = registry.model("user").build(configuration(sizes, 0))
    init = jax.jit(lambda key, batch: model.init(key, gather({}, batch), train=False))
    variables = init(jax.random.key(0), {name: values[:1] for name, values in host.items()})
    steps = {queue: Steps(configuration(sizes, queue), variables, host) for queue in (0, *sizes.queues)}
    times = interleave({str(queue): call for queue, call in steps.items()}, sizes.rounds)
    step_name = f"USER's train step, {sizes.pairs} pairs, BERT of {sizes.layers} layers, {sizes.tokens} tokens"
    return [
        compare(
            "momentum",
            f"{step_name}, key encoders and queues of {queue} images and captions",
            times[str(queue)],
            "the same without them",
            times["0"],
            work=sizes.pairs,
            unit="pairs",
            aim=0.7,
            memory_bytes=steps[queue].memory,
            reference_memory_bytes=steps[0].memory,
            memory="results, the new state among them, and temporaries",
        )
        for queue in sizes.queues
    ]
