"""The four models with stored caption vectors as their text side, on flickr8k_mini; `configs/vectors_study.py:TEXTS`.

TEXTS: sentences (default), a vector a caption, for 3SHNet and USER's guides | tokens, a vector a token, for ESA-style
sets | attention, the same for CMSEI-style cross-attention. VSE-infinity is an arm of each.

Loss, optimiser, units and text head (an MLP with dropout) are those of align.py:small,units. Batches of five captions
of 128 images, the rate, 120 steps and the widths are ours: an image costs far more here than a caption.
"""

from ml_collections import ConfigDict

from configs import align, base
from configs.variants import choose

PLAIN = {"semantic": False, "spatial": False, "scene_tokens": False, "category_token": False}


def get_config(variant: str = "") -> ConfigDict:
    """`shnet study` trains all arms; needs regions, grid, segmentation, and caption_embeddings or caption_tokens.

    Sentences also need image_embedding: for CGE, the image vectors of another trained run, of `shnet embed`. Attention
    also needs boxes, and relations of `shnet data relations`.
    """
    (texts,) = choose(variant, ("sentences", "tokens", "attention"))
    c = {"sentences": sentences, "tokens": tokens, "attention": attention}[texts]()
    c.name = f"stored vectors of {texts}, one recipe"
    return c


def common() -> ConfigDict:
    """The recipe of all arms."""
    c = align.get_config("small,units")
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
    c.study.seeds = (0, 1, 2)
    c.study.arms = ConfigDict()
    c.study.arms.vse_infinity = ConfigDict({"model": PLAIN})
    return c


def sentences() -> ConfigDict:
    """3SHNet, and USER with each guide."""
    c = common()
    c.study.arms.shnet = ConfigDict({})
    for guides in (("sge",), ("sge", "cge"), ("cge",)):
        c.study.arms["_".join(guides)] = ConfigDict({"model": {"name": "user", "user": {"guides": guides}}})
    c.study.compare = ("shnet - vse_infinity", "sge - vse_infinity", "sge_cge - sge", "cge - sge")
    return c


def tokens() -> ConfigDict:
    """ESA-style embedding sets."""
    c = common()
    c.text.source = "caption_tokens"
    c.study.arms.esa = ConfigDict({"model": {"name": "esa"}})
    c.study.compare = ("esa - vse_infinity",)
    return c


def attention() -> ConfigDict:
    """CMSEI-style graphs and cross-attention on regions alone: narrow, with few pairs, as every pair is costly."""
    c = common()
    c.text.source = "caption_tokens"
    c.model.units = ("regions",)
    c.model.dim = 128
    c.data.captions_per_image = 1
    c.train.batch_size, c.train.steps = 64, 400
    c.study.arms.cmsei = ConfigDict({"model": {"name": "cmsei"}})
    c.study.compare = ("cmsei - vse_infinity",)
    return c
