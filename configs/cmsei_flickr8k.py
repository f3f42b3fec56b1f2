"""CMSEI-style on regions of flickr8k_mini, with a geometric stand-in graph and the MiniLM text tower."""

from ml_collections import ConfigDict

from configs import base
from configs.cmsei_coco import COMPARE, arms


def get_config() -> ConfigDict:
    """Needs `make minilm` and `--config.data.dir` of a set made by from_scan and then by relations --geometric."""
    c = base.get_config()
    c.name = "CMSEI-style, geometric stand-in"
    c.data.resident = True
    c.data.max_tokens = 24
    c.data.token_buckets = (24,)
    c.data.word_mask = 0.0  # a frozen tower knows no mask tokens: altered words are deleted
    c.data.word_random = 0.0
    c.data.word_delete = 1.0
    c.text.weights = "minilm"
    c.text.dtype = "auto"
    c.text.frozen_layers = 6
    c.model.name = "cmsei"
    c.model.dim = 128
    c.loss.weights.triplet = 0.0  # the hardest negatives of small sets end on the collapse plateau (docs/results.md)
    c.loss.weights.infonce = 1.0
    c.loss.weights.global_triplet = 1.0
    c.loss.global_triplet.warmup_epochs = 0.0
    c.loss.global_triplet.softness = 0.07
    c.loss.global_triplet.reduction = "mean"
    c.train.batch_size = 32
    c.train.epochs = 2.5
    c.train.eval_epochs = 0.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 0.5
    c.optim.ema = 0.98
    c.eval.two_stage = 50
    c.study.seeds = (0, 1, 2)
    c.study.arms = arms({})
    c.study.arms.shnet = ConfigDict({"model": {"name": "shnet"}, "loss": {"weights": {"global_triplet": 0.0}}})
    c.study.compare = (*COMPARE, "full - shnet")
    return c
