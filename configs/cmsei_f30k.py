"""CMSEI-style on Flickr30K: as on COCO, by analogy (the paper's values are not known to us)."""

from ml_collections import ConfigDict

from configs import cmsei_coco


def get_config() -> ConfigDict:
    """Needs `data.dir` with boxes (docs/models.md) and `text.weights`."""
    c = cmsei_coco.get_config()
    c.name = "CMSEI-style, Flickr30K"
    c.data.max_tokens = 40
    c.data.token_buckets = (16, 24, 40)
    return c
