"""The points of a scaling study, the checks of `config.scale`, and the configuration of each point."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from shnet_jax.data.batches import token_buckets
from shnet_jax.types import PAIR_STRATEGIES

DTYPES = ("float32", "bfloat16")

Record = dict[str, Any]
"""A point's JSON: status, message and settings; the figures of `scaling.point` where it was measured."""

# Sections of the configuration that change nothing of a training step.
_IRRELEVANT = ("name", "eval", "study")


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement. strategy: config.loss.pairs.strategy. dtype: of both towers. pairs: batch of each device."""

    strategy: str
    dtype: str
    pairs: int
    devices: int

    @property
    def batch(self) -> int:
        """Pairs of the global batch."""
        return self.pairs * self.devices

    @property
    def name(self) -> str:
        """Stem of the point's files in the work folder."""
        return f"{self.strategy}_{self.dtype}_{self.pairs}x{self.devices}"

    def __str__(self) -> str:
        return f"{count(self.devices, 'device')} with {count(self.pairs, 'pair')} each, {self.strategy}, {self.dtype}"


def count(number: int, noun: str) -> str:
    """The number with its noun: `1 device`, `2 devices`."""
    return f"{number:,} {noun}{'s' if number > 1 else ''}"


def check_config(config: ConfigDict) -> None:
    """Raises ValueError for settings of a study that do not fit together."""
    s, unit = config.scale, config.data.captions_per_image
    for field, choices in (("strategies", PAIR_STRATEGIES), ("dtypes", DTYPES)):
        if not s[field] or set(s[field]) - set(choices):
            raise ValueError(
                f"config.scale.{field} is {tuple(s[field])}; choose one or more of {', '.join(choices)}, as "
                f'--config.scale.{field}="{choices}"'
            )
    for field in ("devices", "pairs_per_device", "batch_sizes"):
        if any(not isinstance(value, int) or value < 1 for value in s[field]):
            raise ValueError(
                f'config.scale.{field} is {tuple(s[field])}; expected whole numbers of at least 1, or none: "()"'
            )
    if not s.devices or not (s.pairs_per_device or s.batch_sizes):
        raise ValueError("config.scale needs devices, and pairs_per_device or batch_sizes")
    if s.steps < 1 or s.warmup_steps < 0 or s.timeout <= 0:
        raise ValueError(
            f"config.scale.steps is {s.steps}, warmup_steps {s.warmup_steps}, timeout {s.timeout}; expected at least "
            "1, at least 0 and above 0"
        )
    for field, devices in (("pairs_per_device", (1,)), ("batch_sizes", s.devices)):
        for size, n in ((size, n) for size in s[field] for n in devices if size % (n * unit)):
            raise ValueError(
                f"config.scale.{field} has {size}; it must divide into {count(n, 'device')} with whole images of "
                f"config.data.captions_per_image = {unit}"
            )
    if config.data.resident and not config.data.dir:
        raise ValueError("config.data.resident is True and config.data.dir empty: random batches are not resident")


def check_machine(config: ConfigDict, machine: Mapping[str, Any]) -> None:
    """Raises ValueError when the study needs devices that are not there or cannot be compiled for."""
    most = max(config.scale.devices)
    if machine["platform"] != "cpu" and most > machine["devices"]:
        raise ValueError(
            f"config.scale.devices asks for {most}, this machine has {machine['devices']} x {machine['device_kind']}; "
            "JAX_PLATFORMS=cpu compiles for virtual devices instead"
        )
    if machine["platform"] == "cpu" and most > 1 and config.parallel.mapping == "pmap":
        raise ValueError("config.parallel.mapping is pmap, which cannot be compiled without being run: use shard_map")


def sweep(scale: ConfigDict, *, references: bool) -> list[Point]:
    """The points of config.scale, each once.

    references: also one device with each number of pairs that a device of another point has, for the ideal line.
    """
    weak = [(n, pairs) for pairs in scale.pairs_per_device for n in scale.devices]
    strong = [(n, batch // n) for batch in scale.batch_sizes for n in scale.devices]
    alone = [(1, pairs) for _, pairs in strong + weak] if references else []
    return [
        Point(strategy, dtype, pairs, n)
        for dtype in scale.dtypes
        for strategy in scale.strategies
        for n, pairs in dict.fromkeys(weak + strong + alone)
    ]


def point_config(config: ConfigDict, point: Point) -> ConfigDict:
    """The configuration of one point. All captions are padded to the longest bucket, so that every step is the same."""
    changed = ConfigDict(config.to_dict())
    changed.parallel.devices = point.devices
    changed.train.batch_size = point.batch
    changed.loss.pairs.strategy = point.strategy
    changed.model.dtype = changed.text.dtype = point.dtype
    changed.data.token_buckets = token_buckets(config.data)[-1:]
    return changed


def settings_digest(config: ConfigDict, point: Point, machine: Mapping[str, Any]) -> str:
    """SHA-256 of all that a point's figures depend on, except the code and the contents of the data set."""
    settings = {name: value for name, value in point_config(config, point).to_dict().items() if name not in _IRRELEVANT}
    settings["scale"] = {name: settings["scale"][name] for name in ("steps", "warmup_steps")}
    # A point asks for its own number of devices; how many JAX sees does not change it.
    hardware = {name: value for name, value in machine.items() if name != "devices"}
    return hashlib.sha256(json.dumps([settings, hardware], sort_keys=True).encode()).hexdigest()
