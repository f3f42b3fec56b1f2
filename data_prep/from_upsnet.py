"""Imports the label maps that UPSNet writes for COCO (its folders pan_2ch or ssegs).

shnet data from_upsnet --upsnet=DIR --captions=val=captions_val2017.json --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_upsnet", "upsnet", __doc__)

if __name__ == "__main__":
    sys.exit(main())
