"""Imports the feature maps of grid-feats-vqa, one .pth or .npy an image.

python -m data_prep.from_grid_feats --grids=DIR --captions=dataset_coco.json --pool_grids=7 --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep import command, join


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return join.run("from_grid_feats", "grids", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
