"""Runs each point of a scaling study in its own process, and turns a failure into a record."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from shnet_jax.scaling.sweep import Point, Record
from shnet_jax.training.workdir import save_config

MEASURED, FAILED, OUT_OF_MEMORY = "measured", "failed", "out of memory"


def describe_machine(folder: Path) -> dict[str, Any]:
    """`observe.machine.describe` in another process: this one must not take the devices from the points."""
    out, log = folder / "machine.json", folder / "machine.log"
    status = _run_python([str(out)], os.environ, 600.0, log)
    if status != 0:
        raise ValueError(f"JAX finds no devices: {failure(status, log, 600.0)[1]}")
    log.unlink()
    return json.loads(out.read_text(encoding="utf-8"))


def run_point(config: ConfigDict, point: Point, compile_only: bool, folder: Path) -> Record:
    """Measures one point in its own process and returns its record.

    What was measured before a failure counts: a part of the step that does not fit does not lose the whole step.
    The configuration and the output of a failed point stay in `folder`.
    """
    config_file, out, log = (folder / f"{point.name}.{end}" for end in ("config.json", "out.json", "log"))
    save_config(config, config_file)
    out.unlink(missing_ok=True)
    environment = dict(os.environ)
    if compile_only:
        environment["XLA_FLAGS"] = virtual_devices(environment.get("XLA_FLAGS", ""), point.devices)
    arguments = ["--config", str(config_file), *(["--compile_only"] if compile_only else []), str(out)]
    exit_status = _run_python(arguments, environment, config.scale.timeout, log)
    figures = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    out.unlink(missing_ok=True)
    if exit_status == 0:
        config_file.unlink()
        log.unlink()
        return {"status": MEASURED, "message": ""} | figures
    status, message = failure(exit_status, log, config.scale.timeout)
    if figures:
        status, message = MEASURED, f"not all parts were measured: {status}: {message}"
    return {"status": status, "message": message} | figures


def virtual_devices(flags: str, count: int) -> str:
    """XLA_FLAGS for `count` virtual CPU devices, in place of any number given before."""
    others = [flag for flag in flags.split() if not flag.startswith("--xla_force_host_platform_device_count")]
    return " ".join([*others, f"--xla_force_host_platform_device_count={count}"])


def _run_python(arguments: list[str], environment: Mapping[str, str], limit: float, log: Path) -> int | None:
    """Exit status of `scaling.point`, whose output goes to `log`; None when it takes longer than `limit` seconds."""
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    # Filtered tracebacks end in a note instead of the error.
    environment = {**environment, "PYTHONPATH": paths, "JAX_TRACEBACK_FILTERING": "off"}
    command = [sys.executable, "-m", "shnet_jax.scaling.point", *arguments]
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    # The point ends when its standard input closes: it does not outlive this process, however this one ends.
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=output, stderr=merged) as process,
    ):
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()


_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Exit|Memory|Interrupt)\b.*$", re.MULTILINE)


def failure(exit_status: int | None, log: Path, limit: float) -> tuple[str, str]:
    """Failure (status, message) of a process, from its exit status, None for a timeout, and its output."""
    output, where = log.read_text(encoding="utf-8", errors="replace"), f" (output: {log})"
    if exit_status is None:
        return FAILED, f"took longer than config.scale.timeout = {limit:g} seconds{where}"
    errors, lines = list(_ERROR.finditer(output)), output.strip().splitlines()
    message = output[errors[-1].start() :] if errors else (lines[-1] if lines else "no message")
    message = " ".join(message.split())[:500] + where
    if "RESOURCE_EXHAUSTED" in output:
        return OUT_OF_MEMORY, message
    if exit_status < 0:
        name = signal.Signals(-exit_status).name
        guess = " (by the system, for want of memory?)" if name == "SIGKILL" else ""
        return FAILED, f"ended by {name}{guess}: {message}"
    return FAILED, message
