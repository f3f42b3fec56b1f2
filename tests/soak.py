"""Kills real processes at random moments and starts them again: `python -m tests.soak --kills=50 --seed=0`.

Killed (-9 and SIGTERM) are training, also while it writes a checkpoint; evaluation; an importer; --mode=embed; the
building of a FAISS index, where FAISS is installed; a small --mode=scale; training in an emulated S3 bucket, where s3fs
and moto are installed, every second time on another machine. Each is killed a few times, started again by the same
command until it ends by itself, and must then have left what a run that nobody disturbed leaves: the same
parameters bit by bit, the same log, the same files byte by byte, the same results.

Prints a line for each kill and a table; exits with status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from shnet_jax import mirror, storage
from shnet_jax.observe.terminal import make_output_safe
from tests.compiling import xla_flags
from tests.processes import ROOT, Program
from tests.storage import emulators

STEPS = 30
KILLS_OF_A_RUN = 4  # then it may end
BUCKET = f"s3://{emulators.BUCKET}"
SAVING = "checkpoints/*.orbax-checkpoint-tmp*"
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@dataclass(frozen=True)
class Subject:
    """Something to kill.

    command: of a run that writes below a folder. result: what it has left there, in a form that == compares.
    points: files there whose appearance is a moment to kill that half of the kills wait for, "" for none. weight: its
    share of the kills.
    """

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    weight: float
    points: str = ""


@dataclass
class Tally:
    """A row of the table."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys((s.name for s in SIGNALS), 0))
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def flags(data: Path, mode: str, **changes: Any) -> list[str]:
    """Of main.py, for the tiny model on the tiny data set."""
    from tests.train import tiny

    values = dict(tiny.CHANGES) | {"data.dir": data, "model.name": "tests.train.toy", "train.steps": STEPS}
    values |= {"train.eval_epochs": 1.0, "eval.batch_size": 4}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [
        "main.py",
        f"--mode={mode}",
        "--config=configs/scenes.py",
        *(f"--config.{n}={v}" for n, v in values.items()),
    ]


def subjects(place: Path) -> tuple[list[Subject], list[str]]:
    """All that can be killed here, and a line for what cannot; what they need is made in `place`."""
    from tests.train import tiny

    data, trained, features = tiny.dataset().parent, place / "trained", place / "npy"
    finish([*flags(data, "train"), f"--workdir={trained}"], place / "trained.log")
    write_features(features)

    def parameters(folder: Path) -> Any:
        arrays = tiny.arrays(folder, STEPS)
        assert len(arrays) > 20
        names = [path.name for path in (folder / "checkpoints").iterdir()]
        assert all(name.isdecimal() for name in names), f"half written or set aside: {names}"
        return {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in arrays.items()}, tiny.lines(folder)

    def with_run(mode: str, **changes: Any) -> Callable[[Path], list[str]]:
        def command(folder: Path) -> list[str]:
            if not folder.exists():
                shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("results_*", "queries_*"))
            return [*flags(data, mode, **changes), f"--workdir={folder}"]

        return command

    def results(folder: Path) -> Any:
        found = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("results_*.json")}
        assert found
        return found, contents(folder, "queries_*")

    def importing(folder: Path) -> list[str]:
        given = {"src": features, "features": features / "grids", "as": "grid", "name": "killed", "out": folder}
        return ["-m", "data_prep.from_npy", *(f"--{name}={value}" for name, value in given.items())]

    def points(folder: Path) -> Any:
        rows = (folder / "scaling.csv").read_text(encoding="utf-8").splitlines()
        assert (folder / "report.html").exists() and not list((folder / "points").glob("*.log"))
        return [row.split(",")[:5] for row in rows]  # what was measured differs from run to run

    def scaling(folder: Path) -> list[str]:
        values = {"devices": "(1,)", "pairs_per_device": "(10,20)", "batch_sizes": "()", "strategies": "('gathered',)"}
        values |= {"dtypes": "('float32',)", "steps": "2", "warmup_steps": "0"}
        return [*flags(data, "scale"), *(f"--config.scale.{n}={v}" for n, v in values.items()), f"--workdir={folder}"]

    found = [
        Subject("train", lambda folder: [*flags(data, "train"), f"--workdir={folder}"], parameters, 0.44, SAVING),
        Subject("eval", with_run("eval"), results, 0.14),
        Subject("import", importing, lambda folder: contents(folder, "**/*"), 0.16),
        Subject(
            "embed",
            with_run("embed", search__split="train"),
            lambda folder: contents(folder / "embeddings", "**/*"),
            0.18,
            "embeddings/*/parts/*-*5.safetensors",
        ),
        Subject("scale", scaling, points, 0.04),
    ]
    skipped = []
    if emulators.missing("s3"):
        skipped.append(f"bucket: not killed, since {emulators.missing('s3')} is not installed (make setup)")
    else:
        found.append(Subject("bucket", in_bucket(data), lambda folder: parameters(fetched(folder)), 0.2))
    if importlib.util.find_spec("faiss") is None:
        return found, [*skipped, "index: not killed, since faiss is not installed (pip install faiss-cpu)"]
    searching = with_run("search", search__split="train", search__index="faiss", search__faiss="HNSW32")
    index = Subject(
        "index",
        lambda folder: [*searching(folder), "--query=a red star"],
        lambda folder: contents(folder / "embeddings", "**/*"),
        0.12,
    )
    return [*found, index], skipped


def in_bucket(data: Path) -> Callable[[Path], list[str]]:
    """The command that trains in the bucket, below the name of a folder; every second time on another machine."""
    [version] = {path.parent for path in data.rglob("dataset_info.json")}
    for file in version.iterdir():
        storage.upload(file, f"{BUCKET}/sets/tiny/1.0.0/{file.name}")
    starts = itertools.count()

    def command(folder: Path) -> list[str]:
        if next(starts) % 2:
            shutil.rmtree(storage.cache_folder(), ignore_errors=True)
        changes = [flag for flag in flags(data, "train") if not flag.startswith("--config.data.dir")]
        return [*changes, f"--config.data.dir={BUCKET}/sets/tiny", f"--workdir={BUCKET}/runs/{folder.name}"]

    return command


def fetched(folder: Path) -> Path:
    """The files of a run in the bucket, copied to `folder`."""
    shutil.rmtree(storage.cache_folder(), ignore_errors=True)
    copy = mirror.Mirror(f"{BUCKET}/runs/{folder.name}")
    copy.fetch()
    return Path(shutil.copytree(copy.folder, folder))


def write_features(folder: Path, images: int = 300) -> None:
    """One .npy an image, captions and ids, as `data_prep.from_npy` reads them."""
    random_numbers, words = np.random.default_rng(0), [f"word{i}" for i in range(60)]
    (folder / "grids").mkdir(parents=True)
    for split, count in (("train", images), ("val", 20)):
        ids = [f"{split}{i}" for i in range(count)]
        for name in ids:
            np.save(folder / "grids" / f"{name}.npy", random_numbers.standard_normal((9, 16)).astype(np.float32))
        captions = [" ".join(random_numbers.choice(words, 8)) for _ in range(5 * count)]
        (folder / f"{split}_ids.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
        (folder / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    """Of every file but temporary ones; fails when there is none."""
    paths = [p for p in sorted(folder.glob(pattern)) if p.is_file() and p.suffix != ".tmp"]
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
    assert found, f"nothing in {folder}"
    return found


def finish(command: list[str], log: Path) -> float:
    """Runs to the end; seconds. Raises RuntimeError with the end of the output when it fails."""
    begin = time.monotonic()
    with Program(command, log) as process:
        status = process.wait()
    if status != 0:
        raise RuntimeError(f"{' '.join(command)}\nended with status {status}:\n{process.output()[-2000:]}")
    return time.monotonic() - begin


def kill(subject: Subject, folder: Path, log: Path, moment: float, choose: random.Random) -> tuple[str, float]:
    """Starts and kills `moment` seconds later, or at the subject's point.

    The name of the signal, "" when the process ended before, and the seconds that it lived.
    """
    number = choose.choice(SIGNALS)
    at_point = subject.points != "" and choose.random() < 0.5
    before, begin = set(folder.glob(subject.points or "*")), time.monotonic()

    def now() -> bool:
        return bool(set(folder.glob(subject.points)) - before) if at_point else time.monotonic() - begin >= moment

    with Program(subject.command(folder), log) as process:
        if process.until(now):
            process.send(number)
        lived = time.monotonic() - begin
        status = process.wait()
    if status == 0:
        return "", lived
    if status in (-number, 128 + number):
        return number.name, lived
    raise RuntimeError(f"ended with status {status}: {process.output()[-2000:]}")


def soak(subject: Subject, kills: int, place: Path, choose: random.Random) -> Tally:
    """Kills it that often, in runs that are killed a few times each and then end."""
    tally = Tally()
    undisturbed = place / f"{subject.name}_undisturbed"
    try:
        seconds = finish(subject.command(undisturbed), place / f"{subject.name}.log")
        expected = subject.result(undisturbed)
    except (RuntimeError, OSError, AssertionError) as error:
        tally.faults.append(str(error))
        print(f"{subject.name}, undisturbed: FAULT: {error}", flush=True)
        return tally
    while (left := kills - sum(tally.kills.values())) and tally.runs < 3 * kills and not tally.faults:
        tally.runs += 1
        folder, log = place / f"{subject.name}_{tally.runs}", place / f"{subject.name}_{tally.runs}.log"
        try:
            ended = False
            for _ in range(min(KILLS_OF_A_RUN, left)):
                name, lived = kill(subject, folder, log, choose.uniform(0, seconds), choose)
                told = f"{name} after" if name else "ended by itself, not killed, after"
                print(f"{subject.name}, run {tally.runs}: {told} {lived:.2f} s", flush=True)
                if ended := not name:
                    seconds = min(seconds, lived)  # the first one had nothing compiled
                    break
                tally.kills[name] += 1
            if not ended:
                finish(subject.command(folder), log)
            if subject.result(folder) != expected:
                raise RuntimeError(f"{folder} is not as {undisturbed}")
        except (RuntimeError, OSError, AssertionError) as error:
            tally.faults.append(str(error))
            print(f"{subject.name}, run {tally.runs}: FAULT: {error}", flush=True)
        else:
            shutil.rmtree(folder)
    return tally


@contextlib.contextmanager
def surroundings(place: Path) -> Iterator[None]:
    """The environment of all processes: one CPU device, badly compiled programs, kept for the next process."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(1),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MPLBACKEND": "agg",
    }
    os.chdir(ROOT)
    with contextlib.ExitStack() as stack:
        if not emulators.missing("s3"):
            _, environment = stack.enter_context(emulators.s3())
            os.environ |= environment | {storage.CACHE: str(place / "cache"), "SHNET_SYNC_SECONDS": "0.3"}
        yield


def shares(weights: list[float], kills: int) -> list[int]:
    """Whole numbers of kills in about these proportions; what is left over goes where most of it was cut off."""
    exact = [kills * weight / sum(weights) for weight in weights]
    found = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: found[i] - exact[i])[: kills - sum(found)]:
        found[i] += 1
    return found


def main() -> int:
    """Command line; returns the exit status."""
    make_output_safe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names by commas; all unless told")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # of what is read of the checkpoints here
    place, begin = Path(tempfile.mkdtemp(prefix="shnet_jax_soak_")), time.monotonic()
    with surroundings(place):
        found, skipped = subjects(place)
        chosen = [s for s in found if not args.only or s.name in args.only.split(",")]
        each = shares([s.weight for s in chosen], args.kills)
        choose = random.Random(args.seed)
        tallies = {s.name: soak(s, n, place, choose) for s, n in zip(chosen, each, strict=True) if n}
    print(f"\n| what | kills | {' | '.join(s.name for s in SIGNALS)} | runs | outcome |\n|---|---:|---:|---:|---:|---|")
    for name, tally in tallies.items():
        numbers = " | ".join(str(n) for n in (sum(tally.kills.values()), *tally.kills.values(), tally.runs))
        print(f"| {name} | {numbers} | {'FAULT' if tally.faults else 'as undisturbed'} |")
    short = {n: k for (n, t), k in zip(tallies.items(), filter(None, each), strict=True) if sum(t.kills.values()) < k}
    print("\n".join([*skipped, *(f"{name}: fewer kills than the {k} wanted" for name, k in short.items())]))
    print(f"{sum(sum(t.kills.values()) for t in tallies.values())} kills in {time.monotonic() - begin:.0f} s")
    if any(tally.faults for tally in tallies.values()) or short:
        print(f"what was left: {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
