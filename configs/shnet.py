"""3SHNet, `configs/shnet.py:UNITS,DATA`.

UNITS: region (default) | grid | hybrid: one model over both; the published hybrid is an ensemble (docs/evaluate.md).
DATA: coco (default) | f30k | flickr8k | flickr8k_published.
"""

from ml_collections import ConfigDict

from configs import base
from configs.variants import choose

UNITS = {"region": ("regions",), "grid": ("grid",), "hybrid": ("regions", "grid")}


def get_config(variant: str = "") -> ConfigDict:
    """Needs `--config.data.dir` with these units (docs/data.md).

    Published: COCO and Flickr30K need `--config.text.weights` (bert-base-uncased). Flickr8k needs `make minilm`.
    """
    recipes = {"coco": coco, "f30k": f30k, "flickr8k": flickr8k, "flickr8k_published": flickr8k_published}
    units, data = choose(variant, tuple(UNITS), tuple(recipes))
    c = recipes[data]()
    c.name = f"3SHNet {units}, {data}"
    c.model.units = UNITS[units]
    return c


def coco() -> ConfigDict:
    """The published training script for regions, as base.py has it; the released code has no grid variant.

    That code selects by the first 1,000 images of the 5,000 in `val`, here all are used.
    """
    c = base.get_config()
    c.loss.triplet.mask_same_image = False  # published: another caption of the image counts as a negative
    c.train.checkpoint_steps = 1000
    c.eval.protocols = ("whole", "folds5")  # 5K and the five galleries of 1K
    c.study.seeds = (0, 1, 2)
    c.study.compare = ("full - none", "semantic - none", "spatial - none")
    return c


def f30k() -> ConfigDict:
    """COCO's recipe with batches of 128: the settings were not released, these are VSE-infinity's for regions."""
    c = coco()
    c.train.batch_size = 128
    c.eval.protocols = ("whole",)
    return c


def flickr8k() -> ConfigDict:
    """Settings for 1,250 training images: InfoNCE on two captions of 128 images, a frozen MiniLM text tower."""
    c = frozen_minilm(base.get_config())
    c.data.captions_per_image = 2
    c.model.dim = 512
    c.model.dtype = "auto"
    c.loss.weights.infonce = 1.0
    c.loss.weights.triplet = 0.0
    c.train.batch_size = 256
    c.train.epochs = 6.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 1.0
    c.optim.ema = 0.98
    c.study.seeds = (0, 1, 2)
    return c


def flickr8k_published() -> ConfigDict:
    """The published objective and optimiser on flickr8k_mini, cut to 4 epochs, width 512, bfloat16 products."""
    c = base.get_config()
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


def frozen_minilm(c: ConfigDict) -> ConfigDict:
    """Makes the text tower the one of `make minilm`, which stays as it is, on the captions of flickr8k_mini."""
    c.data.resident = True
    c.data.max_tokens = 24
    c.data.token_buckets = (24,)
    c.data.word_mask = 0.0  # a frozen tower knows no mask tokens: altered words are deleted
    c.data.word_random = 0.0
    c.data.word_delete = 1.0
    c.text.weights = "minilm"
    c.text.dtype = "auto"
    c.text.frozen_layers = 6
    return c
