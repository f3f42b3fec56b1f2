"""Imports the feature maps of grid-feats-vqa, one .pth or .npy an image.

shnet data from_grid_feats --grids=DIR --captions=dataset_coco.json --pool_grids=7 --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_grid_feats", "grids", __doc__)

if __name__ == "__main__":
    sys.exit(main())
