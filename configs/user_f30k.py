"""USER (SGE) on Flickr30K as published: what differs from COCO."""

from ml_collections import ConfigDict

from configs import user_coco


def get_config() -> ConfigDict:
    """USER on Flickr30K: user_coco.py with queues of 2,048, the in-batch part of the loss times 20, 20 epochs."""
    c = user_coco.get_config()
    c.name = "USER (SGE), Flickr30K"
    c.loss.uto.batch_weight = 20.0
    c.momentum.queue = 2048
    c.optim.decay_epochs = (10.0,)
    c.train.epochs = 20.0
    return c
