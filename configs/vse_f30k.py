"""VSE-infinity on the regions of Flickr30K: shnet_f30k_region.py without anything that a segmentation says."""

from ml_collections import ConfigDict

from configs import shnet_f30k_region


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` with regions and captions alone, and `--config.text.weights` (bert-base-uncased)."""
    c = shnet_f30k_region.get_config()
    c.name = "VSE-infinity region, Flickr30K"
    c.model.update(c.study.arms.none.model)
    c.study.arms = ConfigDict({"full": {}})
    c.study.compare = ()
    return c
