"""Imports regions and boxes from a dictionary by image that PyTorch saved, as Oscar's retrieval has them.

shnet data from_torch --torch=FILE.pt --captions=dataset_coco.json --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_torch", "torch", __doc__)

if __name__ == "__main__":
    sys.exit(main())
