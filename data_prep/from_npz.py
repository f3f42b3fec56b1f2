"""Imports regions and boxes, or a grid, kept as one .npz an image.

shnet data from_npz --npz=DIR --captions=dataset_coco.json --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_npz", "npz", __doc__)

if __name__ == "__main__":
    sys.exit(main())
