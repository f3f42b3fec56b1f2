"""Imports regions and boxes, or a grid, from HDF5 files.

    shnet data from_hdf5 --hdf5=train36.hdf5,val36.hdf5 --captions=dataset_coco.json --name=NAME \\
        --out=DATA_DIR [--sizes=instances_train2014.json]

It needs: pip install -e '.[hdf5]'
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_hdf5", "hdf5", __doc__)

if __name__ == "__main__":
    sys.exit(main())
