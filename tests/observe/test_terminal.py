"""Printing never ends a command. Each test is a process of its own, as the streams are those of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAFE = "import sys; from shnet_jax.observe.terminal import make_output_safe; make_output_safe(); "
MANY = f"{SAFE}[print('a' * 99, file={{stream}}) for _ in range(5000)]; open(sys.argv[1], 'w').close()"
COMMAND = """
import sys
from data_prep.command import reports_errors
@reports_errors
def main(argv):
    print("i\\u2192t")
    return 0
main([])
"""


def run(code, *arguments, encoding="utf-8"):
    """The process of `python -c CODE`, which has ended; its output as bytes."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", b"i->t 1 +- 2 >= \\u72ac \\udcff\n"),
        ("latin-1", b"i->t 1 \xb1 2 >= \\u72ac \\udcff\n"),
        ("cp1252", b"i->t 1 \xb1 2 >= \\u72ac \\udcff\n"),
        ("utf-8", "i→t 1 ± 2 ≥ 犬 \\udcff\n".encode()),
    ],
)
def test_characters_that_the_terminal_lacks(encoding, text):
    done = run(SAFE + r"print('i\u2192t 1 \xb1 2 \u2265 \u72ac \udcff')", encoding=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, text, b"")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_command_goes_on_without_its_reader(closed, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    other = {"stdout": "stderr", "stderr": "stdout"}[closed]
    pipes = {closed: writer, other: subprocess.PIPE}
    code = MANY.format(stream=f"sys.{closed}")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "end")], cwd=ROOT, timeout=60, check=False, **pipes
    )
    os.close(writer)
    assert done.returncode == 0 and (tmp_path / "end").exists()
    assert not (done.stdout or done.stderr)


def test_ctrl_c_in_a_command_that_imports_data():
    done = run(COMMAND.replace("    return 0", "    raise KeyboardInterrupt").replace("main([])", "sys.exit(main([]))"))
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_unbuffered_output_stays_so(stream):
    """Containers set PYTHONUNBUFFERED; the end of the process flushes nothing here."""
    code = f"{SAFE}import os; print('said', file=sys.{stream}); os._exit(0)"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False
    )
    assert getattr(done, stream) == b"said\n"


def test_without_any_stdout():
    done = subprocess.run(
        [sys.executable, "-c", f"{SAFE}print(1)"], cwd=ROOT, timeout=60, preexec_fn=lambda: os.close(1)
    )
    assert done.returncode == 0


def test_commands_that_import_data(tmp_path):
    done = run(COMMAND, encoding="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"i->t\n", b"")


# Those whose output a program of ours reads, which is JSON in ASCII, print nothing else.
READ_BY_PROGRAMS = {
    "ranking.py",
    "losses.py",
    "memory.py",
    "soak.py",
    "worker.py",
    "make.py",
    "point.py",
    "align.py",
    "accelerators.py",
}


def test_every_command_is_safe():
    """Files that can be run call the function, or are run by a `main` that does."""
    folders = [ROOT / name for name in ("benchmarks", "data_prep", "shnet_jax", "tests")]
    files = [ROOT / "main.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    commands = [path for path in files if '\nif __name__ == "__main__":' in path.read_text("utf-8")]
    ways = (
        "make_output_safe()",
        "reports_errors",
        "join.importer(",
        ".write import main",
        "benchmarks.runner import main",
        "shnet_jax.cli import run",
    )
    unsafe = {path.name for path in commands if not any(way in path.read_text("utf-8") for way in ways)}
    assert len(commands) > 15 and unsafe <= READ_BY_PROGRAMS
