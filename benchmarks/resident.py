"""Resident memory of a process over its life, read from /proc (Linux)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from shnet_jax.observe import machine

INTERVAL = 0.05
"""Seconds between two looks."""

Curve = list[tuple[float, int]]
"""Memory curve: (seconds since the start, bytes)."""


def bytes_of(process: int | str = "self", entry: str = "VmRSS") -> int:
    """Memory that a process holds now; 0 when it is gone. RuntimeError without /proc.

    entry: VmRSS, all of it | VmHWM, the most it ever held | RssAnon, without files that it has mapped, whose pages come
    and go as the system pleases.
    """
    if not os.path.exists("/proc/self/status"):
        raise RuntimeError("resident memory is read from /proc, which this system does not have")
    try:
        text = machine.entry(f"/proc/{process}/status", entry)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.split()[0]) * 1024 if text else 0


def watch(command: Sequence[str], folder: Path) -> tuple[Curve, int]:
    """Runs a Python command line in `folder` to its end; its curve and its peak in bytes.

    Raises RuntimeError with the end of what it said when it fails.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        curve: Curve = []
        peak = 0
        try:
            while process.poll() is None:
                if held := bytes_of(process.pid):
                    curve.append((round(time.perf_counter() - start, 3), held))
                    peak = max(peak, bytes_of(process.pid, "VmHWM"))
                time.sleep(INTERVAL)
        finally:
            process.kill()
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{text}")
    return curve, peak
