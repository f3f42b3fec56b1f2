"""Imports segmentations in COCO's panoptic format, PNG and JSON.

    shnet data from_panoptic --panoptic=panoptic_val2017.json --captions=val=captions_val2017.json \\
        --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_panoptic", "panoptic", __doc__)

if __name__ == "__main__":
    sys.exit(main())
