"""Fuzzing led by coverage, with the optional package atheris (Linux, `pip install atheris`)."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path


def fuzz(name: str, seconds: float, out: Path) -> int:
    """Runs libFuzzer, which ends the process: with status 77 at the first finding, whose input it keeps in `out`."""
    import atheris

    # Both are imported already, but not instrumented.
    for module in [m for m in sys.modules if m.startswith(("shnet_jax", "data_prep", "tests.fuzz"))]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["shnet_jax", "data_prep"], enable_loader_override=False):
        from tests.fuzz import worker
        from tests.fuzz.targets import TARGETS
    target, folder = TARGETS[name], Path(tempfile.mkdtemp(prefix="fuzz_"))
    seeds = Path(tempfile.mkdtemp(prefix="fuzz_seeds_"))
    for number, data in enumerate(target.seeds()):
        worker.attempt(target, data, folder, None)
        (seeds / str(number)).write_bytes(data)
    watch = worker.Watch(folder)

    def one(data: bytes) -> None:
        wrong, _ = worker.attempt(target, data, folder, watch)
        if wrong is not None:
            raise RuntimeError(wrong)

    def custom(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return (target.make(data, rng) if data and rng.random() < 0.7 else atheris.Mutate(data, most))[:most]

    limits = [
        f"-max_total_time={int(seconds)}",
        f"-timeout={int(worker.SECONDS)}",
        "-rss_limit_mb=4096",
        "-max_len=65536",
    ]
    atheris.Setup([sys.argv[0], f"-artifact_prefix={out}/", *limits, str(seeds)], one, custom_mutator=custom)
    atheris.Fuzz()
    return 0
