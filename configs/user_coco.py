"""USER (SGE) on the regions of COCO as published: momentum encoders, queues of 4,096, the unified objective."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` with 36 regions an image and `--config.text.weights` of BERT-base (docs/models.md)."""
    c = base.get_config()
    c.name = "USER (SGE)"
    c.model.name = "user"
    c.model.user = user = ConfigDict()  # what this model has beside the fields of base.py
    user.guides = ("sge",)  # what enhances the units: "sge" (published), "cge" (image_embedding: ours); (): nothing
    user.attention_scale = 1.0  # factor on the scores of guide and units (published 1)
    user.dropout = 0.4  # dropout within the self-guide (published 0.4)
    user.norm = "slots"  # of the self-guide: "slots", BatchNorm per place of 36 (published) | "layer", any number
    c.data.region_drop = 0.0
    c.loss.weights.triplet = 0.0
    c.loss.weights.uto = 1.0
    c.loss.uto.batch_weight = 1.0
    c.loss.uto.mask_same_image = False
    c.momentum.queue = 4096
    c.optim.decay_epochs = (15.0,)
    c.study.arms = ConfigDict()
    c.study.arms.user = ConfigDict({})
    c.study.arms.no_guide = ConfigDict({"model": {"user": {"guides": ()}}})
    c.study.arms.no_queue = ConfigDict({"momentum": {"queue": 0}})
    c.train.batch_size = 128
    c.train.epochs = 25.0
    return c
