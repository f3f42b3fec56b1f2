"""3SHNet, VSE-infinity and USER's guides with stored caption vectors as their text side, on flickr8k_mini.

Loss, optimiser, units and text head (an MLP with dropout) are those of align.py:small,units. Batches of five captions
of 128 images, the rate, 120 steps and the widths are ours: an image costs far more here than a caption.
"""

from ml_collections import ConfigDict

from configs import align, base


def get_config() -> ConfigDict:
    """`shnet study` trains all arms; needs regions, grid, segmentation, caption_embeddings and image_embedding.

    image_embedding, for CGE, holds the image vectors of another trained run, of `shnet embed`.
    """
    c = align.get_config("small,units")
    c.name = "stored caption vectors, one recipe"
    c.model.update(base.get_config().model)
    c.model.units = ("regions", "grid")
    c.model.dim = 256
    c.model.map_channels = 32
    c.model.user.norm = "layer"  # regions are dropped
    c.optim.lr = 1e-3
    c.data.captions_per_image = 5
    c.train.batch_size = 640
    c.train.epochs, c.train.steps = 0.0, 120
    c.train.eval_epochs, c.train.eval_percent = 0.0, 25.0
    off = {"semantic": False, "spatial": False, "scene_tokens": False, "category_token": False}
    c.study.seeds = (0, 1, 2)
    c.study.arms = ConfigDict()
    c.study.arms.shnet = ConfigDict({})
    c.study.arms.vse_infinity = ConfigDict({"model": off})
    for guides in (("sge",), ("sge", "cge"), ("cge",)):
        c.study.arms["_".join(guides)] = ConfigDict({"model": {"name": "user", "user": {"guides": guides}}})
    c.study.compare = ("shnet - vse_infinity", "sge - vse_infinity", "sge_cge - sge", "cge - sge")
    return c
