"""The published 3SHNet objective and optimiser, cut to 4 epochs, width 512, bfloat16 products, on flickr8k_mini."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` and `make minilm`; compare with shnet_flickr8k.py."""
    c = base.get_config()
    c.name = "3SHNet region, published recipe"
    c.data.resident = True
    c.text.weights = "minilm"
    c.text.dtype = c.model.dtype = "auto"
    c.model.dim = 512
    c.loss.triplet.mask_same_image = False
    c.train.batch_size = 128
    c.train.epochs = 4.0
    c.train.checkpoint_steps = 50
    c.study.seeds = (0, 1, 2)
    c.study.only = ("full", "none")
    return c
