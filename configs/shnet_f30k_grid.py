"""3SHNet on the grid of Flickr30K: the recipe of shnet_f30k_region.py."""

from ml_collections import ConfigDict

from configs import shnet_f30k_region


def get_config() -> ConfigDict:
    """Needs a data set with `grid` (docs/data.md, from_npy --pool=7); cells are dropped as by VSE-infinity."""
    c = shnet_f30k_region.get_config()
    c.name = "3SHNet grid, Flickr30K"
    c.model.units = ("grid",)
    return c
