"""CMSEI-style on the rendered scenes, whose relations are true; narrow, so that a run takes minutes on two cores."""

from ml_collections import ConfigDict

from configs import base
from configs.cmsei_coco import COMPARE, arms


def get_config() -> ConfigDict:
    """Needs `python -m data_prep.scenes --out=data_sets`; `--mode=study` compares the arms."""
    c = base.get_config()
    c.name = "CMSEI-style"
    c.data.dir = "data_sets/scenes"
    c.data.resident = True
    c.data.max_tokens = 44
    c.data.token_buckets = (32, 44)
    c.tokenizer.kind = "sentencepiece"
    c.model.name = "cmsei"
    c.model.dim = 64
    c.model.cmsei.iou_threshold = -1.0  # the scenes' regions hardly overlap: all are neighbours,
    c.model.cmsei.geometry_heads = 8  # weighed by where they lie (ours); the arm plain_spatial has neither
    c.text.tower = "bigru"
    c.text.width = 256
    c.loss.weights.triplet = 0.0  # the hardest negatives of small sets end on the collapse plateau (docs/results.md)
    c.loss.weights.infonce = 1.0
    c.loss.weights.global_triplet = 1.0
    c.loss.global_triplet.warmup_epochs = 0.0
    c.loss.global_triplet.softness = 0.07
    c.loss.global_triplet.reduction = "mean"
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 0.25
    c.train.batch_size = 32
    c.train.epochs = 1.25
    c.train.eval_epochs = 0.0  # a validation takes as long as many steps
    c.eval.two_stage = 50
    c.study.seeds = (0, 1, 2)
    c.study.arms = arms({})
    c.study.arms.plain_spatial = ConfigDict({"model": {"cmsei": {"iou_threshold": 0.4, "geometry_heads": 0}}})
    c.study.compare = (*COMPARE, "full - plain_spatial")
    return c
