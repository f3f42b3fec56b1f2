"""VSE-infinity on the regions of COCO: shnet_coco_region.py without anything that a segmentation says."""

from ml_collections import ConfigDict

from configs import shnet_coco_region


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` with regions and captions alone, and `--config.text.weights` (bert-base-uncased)."""
    c = shnet_coco_region.get_config()
    c.name = "VSE-infinity region, COCO"
    c.model.update(c.study.arms.none.model)
    c.study.arms = ConfigDict({"full": {}})
    c.study.compare = ()
    return c
