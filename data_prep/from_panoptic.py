"""Imports segmentations in COCO's panoptic format, PNG and JSON.

    python -m data_prep.from_panoptic --panoptic=panoptic_val2017.json --captions=val=captions_val2017.json \\
        --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep import command, join


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return join.run("from_panoptic", "panoptic", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
