"""USER (SGE) as published, `configs/user.py:DATA`: momentum encoders, queues, the unified objective.

DATA: coco (default) | f30k | flickr8k: that of f30k, cut to 4 epochs, width 512, bfloat16 products.
"""

from ml_collections import ConfigDict

from configs import base
from configs.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """Needs `--config.data.dir` with 36 regions an image, and the weights of BERT-base (docs/models.md).

    They are `--config.text.weights`; Flickr8k needs `make minilm` instead.
    """
    (data,) = choose(variant, ("coco", "f30k", "flickr8k"))
    c = {"coco": coco, "f30k": f30k, "flickr8k": flickr8k}[data]()
    c.name = f"USER (SGE), {data}"
    return c


def coco() -> ConfigDict:
    """The released settings for COCO; queues of 4,096."""
    c = base.get_config()
    c.model.name = "user"
    c.data.region_drop = 0.0
    c.loss.weights.triplet = 0.0
    c.loss.weights.uto = 1.0
    c.loss.uto.mask_same_image = False
    c.momentum.queue = 4096
    c.study.arms = ConfigDict()
    c.study.arms.user = ConfigDict({})
    c.study.arms.no_guide = ConfigDict({"model": {"user": {"guides": ()}}})
    c.study.arms.no_queue = ConfigDict({"momentum": {"queue": 0}})
    c.train.batch_size = 128
    return c


def f30k() -> ConfigDict:
    """The released settings for Flickr30K: queues of 2,048, the in-batch part of the loss times 20, 20 epochs."""
    c = coco()
    c.loss.uto.batch_weight = 20.0
    c.momentum.queue = 2048
    c.optim.decay_epochs = (10.0,)
    c.train.epochs = 20.0
    return c


def flickr8k() -> ConfigDict:
    """The settings of Flickr30K on flickr8k_mini; compare with user_study.py and shnet.py:flickr8k_published."""
    c = f30k()
    c.data.resident = True
    c.text.weights = "minilm"
    c.text.dtype = c.model.dtype = "auto"
    c.model.dim = 512
    c.train.epochs = 4.0
    c.train.checkpoint_steps = 50
    c.study.seeds = (0, 1, 2)
    c.study.arms = ConfigDict()
    c.study.arms.user = ConfigDict({})
    c.study.arms.masked = ConfigDict({"loss": {"uto": {"mask_same_image": True}}})
    # Key encoders that follow within a short run: 0.999 keeps 82 % of their initial weights after 192 steps.
    c.study.arms.fast = ConfigDict({"momentum": {"warm": True}})
    c.study.arms.no_queue = ConfigDict({"momentum": {"queue": 0}})
    c.study.only = ("user",)
    c.study.compare = ("masked - user", "fast - user", "user - no_queue")
    return c
