"""Compares our modules with recordings of the published code: `python -m tests.parity DIR`.

DIR holds the recorded .npz files. Prints one line per group of arrays (largest error, its tolerance) and how many
arrays were compared and skipped, with the reason; exit status 1 on any miss, 2 when there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import defaultdict
from pathlib import Path

from shnet_jax.observe.terminal import make_output_safe
from tests.parity.compare import Fixture, Row, skip

CHECKS = ("gpo", "shnet", "bert", "losses", "metrics", "train_steps", "user", "user_train_steps", "convert", "align")


def unread(folder: Path, opened: list[Fixture], told: set[str]) -> list[Row]:
    """A skipped row for each recorded result that no check has read or told of."""
    rows = []
    for fixture in opened:
        reason = f"{fixture.name}.npz: its check does not read them"
        rows += [skip(fixture.name, name, reason) for name in sorted(fixture.expected() - fixture.seen - told)]
    for path in sorted(folder.glob("*.npz")):
        if path.stem not in {fixture.name for fixture in opened}:
            reason = f"{path.name}: no check of this run reads it"
            rows += [skip(path.stem, name, reason) for name in sorted(Fixture(path).expected())]
    return rows


def main(folder: Path, names: tuple[str, ...]) -> int:
    """Runs the checks of these names on the recordings in `folder`; returns the exit status."""
    if not any(folder.glob("*.npz")):
        what = "holds no .npz recordings" if folder.is_dir() else "is not a folder"
        print(f"{folder} {what}; give the one with gpo.npz, bert.npz, ...", file=sys.stderr)
        return 2
    rows: list[Row] = []
    Fixture.opened.clear()
    for name in names:
        try:
            rows += importlib.import_module(f"tests.parity.{name}").check(folder)
        except FileNotFoundError as error:
            others = " ".join(n for n in names if n != name)
            print(f"{error.filename} is missing; the other checks: --only {others}", file=sys.stderr)
            return 2
    rows += unread(folder, list(Fixture.opened), told={row.name for row in rows})
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kind = next((k for k in ("grad", "buffer_after", "param_after", "after") if k in row.name), "out")
        groups[row.group, kind].append(row)
    print(f"{'group':32} {'arrays':>6} {'largest error':>14} {'tolerance':>10} {'share':>7}  worst array")
    for (group, kind), members in groups.items():
        compared = [r for r in members if not r.skipped]
        if compared:
            worst = max(compared, key=lambda r: r.worst)
            print(
                f"{group + ' ' + kind:32} {len(compared):6} {worst.error:14.3g} {worst.tolerance:10.3g} "
                f"{worst.worst:7.2f}  {worst.name}{'' if worst.ok else '   MISS'}"
            )
    reasons: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.skipped:
            reasons[row.skipped] += 1
    missed = [r for r in rows if not r.ok]
    for reason, count in reasons.items():
        print(f"skipped {count}: {reason}")
    for row in missed:
        print(f"MISS {row.group} {row.name}: error {row.error:.3g}, {row.worst:.2f} times what is allowed")
    print(f"{len(rows) - sum(reasons.values())} arrays compared, {sum(reasons.values())} skipped, {len(missed)} missed")
    return 1 if missed or all(row.skipped for row in rows) else 0


if __name__ == "__main__":
    make_output_safe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=CHECKS, choices=CHECKS)
    options = parser.parse_args()
    sys.exit(main(options.folder, tuple(options.only)))
