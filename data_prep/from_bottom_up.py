"""Imports regions and boxes from TSV files of bottom-up attention.

shnet data from_bottom_up --bottom_up=FILE.tsv --captions=dataset_coco.json --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_bottom_up", "bottom_up", __doc__)

if __name__ == "__main__":
    sys.exit(main())
