"""Imports vectors that `--mode=embed` of another run wrote, as image_embedding and caption_embeddings.

shnet data from_embeddings --embeddings=FOLDER,... --captions=dataset_coco.json --name=NAME --out=DATA_DIR
"""

from __future__ import annotations

import sys

from data_prep import join

main = join.importer("from_embeddings", "embeddings", __doc__)

if __name__ == "__main__":
    sys.exit(main())
