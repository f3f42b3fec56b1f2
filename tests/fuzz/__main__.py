"""python -m tests.fuzz --target=npy --seconds=60 [--engine=mutation|atheris] [--out=DIR] [--input=FILE]

Time-boxed. Each input is tried in a process that may take 10 s and a bounded part of memory for it, and that notes when
anything outside its folder is opened, or run. Only the documented errors of a parser may come out. Whatever else
happens, a crash of the process included, is a finding: the input is kept in DIR, with what happened beside it. The exit
status is 1 when there is one. --input tries one such file again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from shnet_jax.observe.terminal import make_output_safe
from tests.fuzz import coverage, worker
from tests.fuzz.targets import TARGETS


def supervise(name: str, seconds: float, out: Path) -> int:
    """Workers one after another until the time is over; -> findings."""
    end, tried, taken, number, crashes = time.monotonic() + seconds, 0, 0, 0, 0
    while (left := end - time.monotonic()) > 1:
        (out / "counts.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.fuzz.worker", name, str(number), str(left), str(out)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        counts = json.loads((out / "counts.json").read_text()) if (out / "counts.json").exists() else {}
        tried, taken = tried + counts.get("tried", 0), taken + counts.get("taken", 0)
        if done.returncode:
            crashes += 1
            (out / "current").rename(out / f"{name}_crash_{number}")
            (out / f"{name}_crash_{number}.txt").write_text(f"exit status {done.returncode}\n{done.stderr[-5000:]}\n")
        number += 1
    findings = sorted(path.name for path in out.glob(f"{name}_*.txt"))
    print(
        f"{name}: {tried} inputs, {taken} taken, {tried - taken} refused, {len(findings)} findings ({crashes} crashes)"
    )
    for file in findings:
        print(f"  {out / file}: {(out / file).read_text().strip().splitlines()[-1][:160]}")
    return len(findings)


def main() -> int:
    """Command line; returns the exit status."""
    make_output_safe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=(*TARGETS, "all"), required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--engine", choices=("mutation", "atheris"), default="mutation")
    parser.add_argument("--out", type=Path, help="where findings are kept; default: a new folder")
    parser.add_argument("--input", type=Path, help="try only this file")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="fuzz_findings_"))
    out.mkdir(parents=True, exist_ok=True)
    if args.input:
        with tempfile.TemporaryDirectory() as folder:
            target = TARGETS[args.target]
            wrong, taken = worker.attempt(target, args.input.read_bytes(), Path(folder), worker.Watch(Path(folder)))
            print(wrong or ("taken" if taken else "refused"))
            return int(wrong is not None)
    if args.engine == "atheris":
        return coverage.fuzz(args.target, args.seconds, out)
    names = TARGETS if args.target == "all" else (args.target,)
    return int(sum(supervise(name, args.seconds, out) for name in names) > 0)


if __name__ == "__main__":
    sys.exit(main())
