"""Imports regions and boxes from TSV files of bottom-up attention.

python -m data_prep.from_bottom_up --bottom_up=FILE.tsv --captions=dataset_coco.json --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep import command, join


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return join.run("from_bottom_up", "bottom_up", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
