"""One process that tries inputs until its time is over; what it may not survive, its parent finds."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS, Target

SECONDS = 10.0  # for one input
FACTOR = 100  # bytes that an input may add to the process for each of its own, beside `Target.memory`
HEADROOM = 2**30  # address space beyond what the libraries take

# Events of the interpreter that no parser of ours has a reason for (docs.python.org/3/library/audit_events.html).
FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *("os.remove", "os.rename", "os.symlink", "os.chmod", "os.putenv", "shutil.rmtree", "socket.connect"),
    *("pickle.find_class", "ctypes.dlopen", "webbrowser.open"),
)


class Watch:
    """Notes what is done outside of a folder while it is armed."""

    def __init__(self, folder: Path):
        self._folder, self._armed, self.seen = str(folder), False, []
        self._libraries = tuple({str(Path(p).resolve()) for p in (*sys.path, sys.prefix, sys.base_prefix) if p})
        sys.addaudithook(self._event)

    def __enter__(self) -> None:
        self.seen, self._armed = [], True

    def __exit__(self, *_: object) -> None:
        self._armed = False

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._armed:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            reads = not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            allowed = path.startswith(self._folder) or path == os.devnull
            if not allowed and not (reads and path.startswith(self._libraries)):
                self.seen.append(f"open {path}")


def attempt(target: Target, data: bytes, folder: Path, watch: Watch | None) -> tuple[str | None, bool]:
    """(what is wrong, None if nothing is; whether the input was taken)."""
    for path in folder.iterdir():
        path.unlink()
    before, taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, False
    try:
        with watch or contextlib.nullcontext():
            target.parse(folder, data)
        taken = True
    except target.errors as error:
        if not str(error).strip():
            return f"{type(error).__name__} without a message", False
    except Exception:  # whatever else comes out is what is looked for
        return traceback.format_exc(limit=-8), False
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > target.memory + FACTOR * len(data):
        return f"{grown} bytes of memory for {len(data)} bytes of input", taken
    if watch is not None and watch.seen:
        return "; ".join(watch.seen), taken
    return None, taken


def _kind(wrong: str) -> str:
    """The same for two findings of the same place: the innermost line and the class of the error."""
    lines = wrong.strip().splitlines()
    places = [line for line in lines if line.lstrip().startswith("File ")]
    return f"{places[-1] if places else ''} {re.split('[ :]', lines[-1])[0]}"


def run(name: str, seed: int, seconds: float, out: Path) -> None:
    """Tries inputs of a target; each is in out/current while it is tried, findings stay beside it.

    out/counts.json has how many were tried, and how many of them were taken without an error.
    """
    target, rng, tried, taken = TARGETS[name], random.Random(f"{name} {seed}"), 0, 0
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    seeds, watch, kinds = target.seeds(), Watch(folder), set()
    for data in seeds:  # libraries are imported before anything is limited
        attempt(target, data, folder, None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            data = seeds[tried] if tried < len(seeds) and not seed else target.make(rng.choice(seeds), rng)
            (out / "current").write_bytes(data)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            wrong, was_taken = attempt(target, data, folder, watch)
            faulthandler.cancel_dump_traceback_later()
            tried, taken = tried + 1, taken + was_taken
            if wrong is not None and (kind := _kind(wrong)) not in kinds:
                kinds.add(kind)
                (out / f"{name}_{seed}_{tried}").write_bytes(data)
                (out / f"{name}_{seed}_{tried}.txt").write_text(wrong + "\n")
            if tried % 50 == 0:
                (out / "counts.json").write_text(json.dumps({"tried": tried, "taken": taken}))
    finally:
        shutil.rmtree(folder)
    (out / "counts.json").write_text(json.dumps({"tried": tried, "taken": taken}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("out", type=Path)
    run(**vars(parser.parse_args()))
