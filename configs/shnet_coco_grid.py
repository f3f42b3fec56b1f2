"""3SHNet on the grid of COCO: the recipe of shnet_coco_region.py, as the released code has no grid variant."""

from ml_collections import ConfigDict

from configs import shnet_coco_region


def get_config() -> ConfigDict:
    """Needs a data set with `grid` (docs/data.md, from_npy --pool=7); cells are dropped as by VSE-infinity."""
    c = shnet_coco_region.get_config()
    c.name = "3SHNet grid, COCO"
    c.model.units = ("grid",)
    return c
