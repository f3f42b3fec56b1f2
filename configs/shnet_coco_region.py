"""3SHNet on the regions of COCO (Karpathy split) with BERT-base: the published training script, as base.py has it."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` (docs/data.md) and `--config.text.weights` (bert-base-uncased).

    The released code selects by the first 1,000 images of the 5,000 in `val`, here all are used.
    """
    c = base.get_config()
    c.name = "3SHNet region, COCO"
    c.loss.triplet.mask_same_image = False  # published: another caption of the image counts as a negative
    c.train.checkpoint_steps = 1000
    c.eval.protocols = ("whole", "folds5")  # 5K and the five galleries of 1K
    c.study.seeds = (0, 1, 2)
    c.study.compare = ("full - none", "semantic - none", "spatial - none")
    return c
