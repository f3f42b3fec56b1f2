"""3SHNet on the regions of Flickr30K; its settings were not released, these are VSE-infinity's for regions."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` (docs/data.md) and `--config.text.weights` (bert-base-uncased).

    Batches of 128, the rest as on COCO: 25 epochs, 5e-4, a tenth of that from epoch 15.
    """
    c = base.get_config()
    c.name = "3SHNet region, Flickr30K"
    c.loss.triplet.mask_same_image = False  # published: another caption of the image counts as a negative
    c.train.batch_size = 128
    c.train.checkpoint_steps = 1000
    c.study.seeds = (0, 1, 2)
    c.study.compare = ("full - none", "semantic - none", "spatial - none")
    return c
