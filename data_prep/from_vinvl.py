"""Imports regions and boxes from the TSV files of VinVL and Oscar.

shnet data from_vinvl --vinvl=features.tsv --captions=dataset_coco.json --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_vinvl", "vinvl", __doc__)

if __name__ == "__main__":
    sys.exit(main())
