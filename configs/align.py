"""Heads on frozen features of both sides, `configs/align.py:RECIPE,IMAGE`.

RECIPE: sail (default), as published for 23 million pairs | small, for thousands of images with several captions.
IMAGE: vector (default), image_embedding | units, the means of regions and of grid cells, and the segmentation.
"""

from ml_collections import ConfigDict

from configs import base
from configs.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """Needs `--config.data.dir` with caption_embeddings and what the image side reads; see docs/frozen-features.md."""
    recipe, image = choose(variant, ("sail", "small"), ("vector", "units"))
    c = {"sail": sail, "small": small}[recipe]()
    c.name = f"frozen features, {recipe}"
    if image == "units":
        c.name += ", units"
        c.model.align.source = "units"
        c.model.units = ("regions", "grid")
        c.model.align.vectors = ("coverage", "categories")
        c.model.align.vectors_gain = 0.4
    return c


def sail() -> ConfigDict:
    """SAIL's script (arXiv 2412.04616): star heads, Lion, batches of 32,768, no masks, no warm-up.

    Streamed scores and microbatches are ours; they change memory, not numbers.
    """
    c = base.get_config()
    c.seed = 42
    c.model.name = "align"
    c.model.dim = 1024
    c.model.dtype = c.text.dtype = "auto"
    c.text.tower = "vectors"
    c.loss.weights.triplet = 0.0
    c.loss.weights.sigmoid = 1.0
    c.loss.sigmoid.scale = 20.0
    c.loss.sigmoid.bias = -10.0
    c.loss.sigmoid.reduction = "pairs"
    c.loss.sigmoid.scale_limits = (1.0, 100.0)
    c.loss.sigmoid.mask_same_image = False
    c.loss.pairs.strategy = "streamed"
    c.loss.pairs.tile = 4096
    c.optim.name = "lion"
    c.optim.lr = 1e-5
    c.optim.b2 = 0.99
    c.optim.weight_decay = 1e-4
    c.optim.clip_norm = 0.0
    c.optim.schedule = "constant"
    c.train.batch_size = 32768
    c.train.microbatch = 4096
    c.train.epochs = 100.0
    c.train.log_steps = 10
    return c


def small() -> ConfigDict:
    """The same heads where a batch holds most of the images: other captions of an image are masked, AdamW, dropout."""
    c = sail()
    c.data.resident = True
    c.model.align.head.kind = c.text.head.kind = "mlp"
    c.model.align.head.dropout = c.text.head.dropout = 0.5
    c.model.dim = 512
    c.loss.weights.sigmoid = 0.0
    c.loss.weights.infonce = 1.0
    c.loss.pairs.strategy = "gathered"
    c.optim.name = "adamw"
    c.optim.lr = 5e-4
    c.optim.b2 = 0.999
    c.optim.weight_decay = 0.05
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 1.0
    c.train.batch_size = 1024
    c.train.microbatch = 0
    c.train.epochs = 30.0
    c.study.arms = arms = ConfigDict()
    arms.infonce = ConfigDict({})
    arms.sigmoid = ConfigDict(
        {"loss": {"weights": {"infonce": 0.0, "sigmoid": 1.0}, "sigmoid": {"reduction": "queries"}}}
    )
    c.study.compare = ("infonce - sigmoid",)
    return c
