"""Imports regions and boxes from an LMDB file of UNITER, ViLBERT or MMF.

shnet data from_lmdb --lmdb=FOLDER --captions=dataset_coco.json --name=NAME --out=DATA_DIR

It needs: pip install -e '.[lmdb]'
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_lmdb", "lmdb", __doc__)

if __name__ == "__main__":
    sys.exit(main())
