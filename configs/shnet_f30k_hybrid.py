"""One 3SHNet over regions and grid of Flickr30K; the published hybrid is an ensemble (docs/evaluate.md)."""

from ml_collections import ConfigDict

from configs import shnet_f30k_region


def get_config() -> ConfigDict:
    """Needs a data set with `regions` and `grid`."""
    c = shnet_f30k_region.get_config()
    c.name = "3SHNet regions and grid, Flickr30K"
    c.model.units = ("regions", "grid")
    return c
