"""Helpers shared by the command lines of this folder."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps

from data_prep import notes
from data_prep.bad_records import POLICIES, SKIPPED
from data_prep.schema import DataError
from shnet_jax.observe.files import FolderInUse, describe
from shnet_jax.observe.terminal import make_output_safe
from shnet_jax.paths import to_path

Main = Callable[[Sequence[str] | None], int]


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `shnet data MODULE`, described by the first line of the module's docstring."""
    return argparse.ArgumentParser(prog=f"shnet data {module}", description=(doc or "").partition("\n")[0])


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of a flag that takes whole numbers from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, found {text!r}")
        return value

    return parse


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of everything that writes a data set."""
    parser.add_argument("--name", required=True, help="name of the data set")
    parser.add_argument("--out", type=to_path, required=True, help="folder that holds data sets")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of that name")
    parser.add_argument(
        "--on_bad_record",
        choices=POLICIES,
        default="fail",
        help=f"a record with a fault: fail, or skip it and list it in {SKIPPED} beside the data",
    )


def reports_errors(main: Main) -> Callable[..., int]:
    """Decorates `main(argv) -> status`: faults of data and disk are one line on stderr and status 1, Ctrl-C 130."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        make_output_safe()
        notes.clear()
        try:
            return main(argv)
        except (DataError, FileExistsError, FileNotFoundError, FolderInUse) as error:
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:
            print(f"error: {describe(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        return 1

    return run
