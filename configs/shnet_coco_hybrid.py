"""One 3SHNet over the regions and the grid of COCO; the published hybrid is an ensemble (docs/evaluate.md)."""

from ml_collections import ConfigDict

from configs import shnet_coco_region


def get_config() -> ConfigDict:
    """Needs a data set with `regions` and `grid`."""
    c = shnet_coco_region.get_config()
    c.name = "3SHNet regions and grid, COCO"
    c.model.units = ("regions", "grid")
    return c
