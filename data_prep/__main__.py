"""Lists the importers, or says which of them takes what lies in a folder.

shnet data                      # the importers, a line each
shnet data FOLDER_OR_FILE       # what is recognised there, and the command that imports it
shnet data NAME ARGS            # runs data_prep.NAME, or data_prep.from_NAME
"""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import command
from data_prep.places import LIBRARIES
from data_prep.schema import DataError
from shnet_jax.paths import to_path

_EXTRA = re.compile(r"\[(" + "|".join(LIBRARIES) + r")\]")


def commands() -> dict[str, str]:
    """The docstring of each `shnet data NAME` by NAME; no module is imported for it."""
    folder = Path(__file__).parent
    docs = {}
    for path in [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/__main__.py"))]:
        name = path.parent.name if path.name == "__main__.py" else path.stem
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if path.parent / path.name != Path(__file__) and f"shnet data {name}" in text:
            docs[name] = text
    return docs


def listing() -> str:
    """The importers with the layout that they take and the extra that they need, then the other commands."""
    from data_prep.parts import PARTS

    lines, others = [], []
    for name, text in commands().items():
        if not name.startswith("from_") and name != "extract":
            others.append(name)
            continue
        flag = re.search(rf"shnet data {name} +--(\w+)", text)
        key = flag[1] if flag else ""
        layout = PARTS[key].help if key in PARTS else text.partition("\n")[0].removeprefix("Imports ").rstrip(".")
        extra = _EXTRA.search(text)
        lines.append(f"  {f'{name} --{key}=':34}{layout}{f' (extra {extra[1]})' if extra else ''}")
    return "\n".join(
        [
            "shnet data FOLDER         what lies there, and the command that imports it",
            "shnet data NAME --help    the flags of an importer or command",
            "",
            "importers:",
            *lines,
            "",
            f"extras: pip install -e '.[NAME]'; other commands: {', '.join(others)}",
        ]
    )


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    first, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("-h", "--help"):
        print(listing())
        return 0
    path, known = to_path(first), commands()
    if not rest and path.exists():
        from data_prep.recognise import recognise

        text, recognised = recognise(path)
        print(text)
        return 0 if recognised else 1
    name = first if first in known else f"from_{first}"
    if name not in known:
        raise DataError(f"{first}: expected a folder, a file or one of {', '.join(known)}; found no such")
    sys.argv = [f"data_prep.{name}", *rest]
    runpy.run_module(f"data_prep.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
