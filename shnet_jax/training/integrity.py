"""Checksums of a checkpoint's files: written before its folder gets its name, compared before it is read.

    checkpoints/300/checksums.json   {"model/d/87a1bf": {"bytes": 202, "sha256": "5e1c..."}, ...}

Orbax names the folder of a step when all of it is written, so no kill leaves a named step without checksums. A step
without them was saved by an earlier version.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from shnet_jax.observe.files import write_json

CHECKSUMS = "checksums.json"
DAMAGED = ".damaged"

log = logging.getLogger(__name__)

# Orbax writes these two once more when it names the folder. The first is compared without the time of that, and may get
# the names of its handlers, by a thread of orbax's own, only after the checksums were taken. The second is never read.
_METADATA, _COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
_TIME, _HANDLERS = "commit_timestamp_nsecs", "item_handlers"


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, does not fit the model, or cannot be read or written."""


def write_checksums(folder: Path) -> None:
    """Writes size and SHA-256 of each file below `folder` into its checksums.json."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    write_json(folder / CHECKSUMS, {n: _measure(folder / n)[0] for n in names if n not in (_COMMITTED, CHECKSUMS)})


def faults(folder: Path, below: str = "") -> list[str] | None:
    """Faults of the files of a checkpoint, one line each; None when it has no checksums.

    below: only the files whose name begins with this.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    try:
        saved = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {name: dict(entry) for name, entry in saved.items() if name.startswith(below)}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return [] if below else [f"{CHECKSUMS}: expected a JSON object of sizes and SHA-256, found {error}"]
    return [fault for name, entry in expected.items() if (fault := _fault(folder, name, entry))]


def _fault(folder: Path, name: str, expected: dict[str, Any]) -> str:
    """How a file differs from what was written; "" when it does not."""
    try:
        possible = _measure(folder / name)
    except FileNotFoundError:
        return f"{name}: expected {expected.get('bytes', 'some')} bytes, found no file"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{name}: cannot be read: {error}"
    if any(measured == {key: expected.get(key) for key in measured} for measured in possible):
        return ""
    for key, value in possible[0].items():
        if value != expected.get(key):
            text = "{} bytes" if key == "bytes" else f"{key} {{}}"
            return f"{name}: expected {text.format(expected.get(key))}, found {text.format(value)}"
    return ""


def _measure(path: Path) -> list[dict[str, Any]]:
    """Size and SHA-256 of a file; of orbax's metadata as it is and as it was before its handlers were written."""
    if path.name == _METADATA:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        metadata.pop(_TIME, None)
        texts = (json.dumps(written, sort_keys=True) for written in (metadata, metadata | {_HANDLERS: None}))
        return [{"sha256": hashlib.sha256(text.encode()).hexdigest()} for text in texts]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [{"bytes": file.tell(), "sha256": digest}]


def check(folder: Path, step: int, below: str = "") -> None:
    """Raises CheckpointError when a file of the checkpoint `folder`/`step` is not the one that was written.

    The message names the file, what was expected and found, and the checkpoints that are whole. A checkpoint without
    checksums gets a warning. below: as in `faults`.
    """
    lines = faults(folder / str(step), below)
    if lines != [] and not (folder / str(step)).exists():
        if below:
            return
        raise removed(folder, step)
    if lines is None and not below:
        log.warning(
            "checkpoint %d in %s has no %s (an earlier version saved it): whether its files are whole is not known",
            step,
            folder,
            CHECKSUMS,
        )
    if not lines:
        return
    intact = [other for other in steps(folder) if faults(folder / str(other)) == []]
    raise CheckpointError(
        f"checkpoint {step} in {folder} is damaged:\n  "
        + "\n  ".join(lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else []))
        + f"\nWhole are: {', '.join(map(str, intact)) or 'none'}. Training, started again, sets the damaged one aside "
        "and goes on from the last whole one"
    )


def removed(folder: Path, step: int) -> CheckpointError:
    """The error for a checkpoint that has gone since it was chosen."""
    return CheckpointError(
        f"checkpoint {step} in {folder} was removed while it was read, by the training that goes on there: run this "
        "again"
    )


def set_damaged_aside(workdir: str | Path) -> None:
    """Renames each damaged checkpoint to STEP.damaged, with a warning; training continues from the last whole one.

    Raises CheckpointError, and renames nothing, when none is whole.
    """
    folder = Path(workdir).absolute() / "checkpoints"
    saved = steps(folder)
    damaged = {step: lines for step in saved if (lines := faults(folder / str(step)))}
    if damaged and len(damaged) == len(saved):
        shown = "\n  ".join(f"{step}/{lines[0]}" for step, lines in damaged.items())
        raise CheckpointError(
            f"{folder}: no checkpoint is whole:\n  {shown}\nTo train from the start choose another --workdir, or move "
            "this folder away"
        )
    for step, lines in damaged.items():
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        name = _set_aside(folder, step).name
        log.warning(
            "checkpoint %d in %s is damaged and was skipped, it is %s now: %s%s", step, folder, name, lines[0], more
        )


def steps(folder: Path) -> list[int]:
    """The steps that have a folder below `folder`, ascending; those that were set aside are none."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())


def damaged(folder: Path) -> list[str]:
    """Names of the checkpoints that were set aside."""
    return sorted(path.name for path in folder.glob(f"*{DAMAGED}*"))


def _set_aside(folder: Path, step: int) -> Path:
    names = (folder / f"{step}{DAMAGED}{f'.{i}' if i > 1 else ''}" for i in range(1, 1000))
    target = next(name for name in names if not name.exists())
    return (folder / str(step)).rename(target)
