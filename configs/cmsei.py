"""CMSEI-style, `configs/cmsei.py:DATA`: by analogy, as the paper's values are not known to us.

DATA: coco (default) | f30k | flickr8k, with a geometric stand-in graph | scenes, the rendered ones.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base, shnet
from configs.variants import choose

COMPARE = ("full - no_semantic_graph", "full - no_spatial_graph", "full - no_interaction", "full - vse_infinity")


def get_config(variant: str = "") -> ConfigDict:
    """Needs `--config.data.dir` with boxes (docs/models.md); COCO and Flickr30K also `--config.text.weights`.

    Flickr8k needs `make minilm`, and a set made by from_scan and then by relations --geometric. Scenes need
    `shnet data scenes --out=data_sets` alone. `--mode=study` compares the arms.
    """
    (data,) = choose(variant, ("coco", "f30k", "flickr8k", "scenes"))
    c = {"coco": coco, "f30k": f30k, "flickr8k": flickr8k, "scenes": scenes}[data]()
    c.name = f"CMSEI-style, {data}"
    c.model.name = "cmsei"
    c.loss.weights.global_triplet = 1.0
    return c


def coco() -> ConfigDict:
    """Regions of bottom-up attention with a scene graph; optimiser, margin and batch as VSE-infinity and SCAN."""
    c = base.get_config()
    c.loss.triplet.warmup_epochs = 0.0  # every pair would need a backward pass; the global vectors warm up
    c.train.batch_size = 128
    c.train.epochs = 30.0
    c.eval.two_stage = 128
    c.study.compare = COMPARE
    c.study.arms = arms({"triplet": {"warmup_epochs": 1.0}})
    return c


def f30k() -> ConfigDict:
    """As on COCO, with longer captions."""
    c = coco()
    c.data.max_tokens = 40
    c.data.token_buckets = (16, 24, 40)
    return c


def flickr8k() -> ConfigDict:
    """Regions of flickr8k_mini with the frozen MiniLM text tower."""
    c = small(shnet.frozen_minilm(base.get_config()))
    c.model.dim = 128
    c.train.epochs = 2.5
    c.optim.warmup_epochs = 0.5
    c.optim.ema = 0.98
    c.study.arms.shnet = ConfigDict({"model": {"name": "shnet"}, "loss": {"weights": {"global_triplet": 0.0}}})
    c.study.compare = (*COMPARE, "full - shnet")
    return c


def scenes() -> ConfigDict:
    """Rendered scenes, whose relations are true; narrow, so that a run takes minutes on two cores."""
    c = small(base.get_config())
    c.data.dir = "data_sets/scenes"
    c.data.resident = True
    c.data.max_tokens = 44
    c.data.token_buckets = (32, 44)
    c.tokenizer.kind = "sentencepiece"
    c.model.dim = 64
    c.model.cmsei.iou_threshold = -1.0  # the scenes' regions hardly overlap: all are neighbours,
    c.model.cmsei.geometry_heads = 8  # weighed by where they lie (ours); the arm plain_spatial has neither
    c.text.tower = "bigru"
    c.text.width = 256
    c.optim.lr = 1e-3
    c.optim.warmup_epochs = 0.25
    c.train.epochs = 1.25
    c.study.arms.plain_spatial = ConfigDict({"model": {"cmsei": {"iou_threshold": 0.4, "geometry_heads": 0}}})
    c.study.compare = (*COMPARE, "full - plain_spatial")
    return c


def small(c: ConfigDict) -> ConfigDict:
    """The losses, batches and arms of a small data set."""
    c.loss.weights.triplet = 0.0  # the hardest negatives of small sets end on the collapse plateau (docs/results.md)
    c.loss.weights.infonce = 1.0
    c.loss.global_triplet.warmup_epochs = 0.0
    c.loss.global_triplet.softness = 0.07
    c.loss.global_triplet.reduction = "mean"
    c.optim.schedule = "cosine"
    c.train.batch_size = 32
    c.train.eval_epochs = 0.0  # a validation takes as long as many steps
    c.eval.two_stage = 50
    c.study.seeds = (0, 1, 2)
    c.study.arms = arms({})
    return c


def arms(warmup: dict[str, Any]) -> ConfigDict:
    """The ablations, and VSE-infinity on the same regions and words.

    warmup: of the loss where global vectors are all there is, and no other loss warms up for it.
    """
    plain = {"weights": {"global_triplet": 0.0}, **warmup}
    no_segmentation = {"semantic": False, "spatial": False, "scene_tokens": False, "category_token": False}
    return ConfigDict(
        {
            "full": {},
            "no_semantic_graph": {"model": {"cmsei": {"semantic_graph": False}}},
            "no_spatial_graph": {"model": {"cmsei": {"spatial_graph": False}}},
            "no_interaction": {"model": {"cmsei": {"attend": ()}}, "loss": plain},
            "vse_infinity": {"model": {"name": "shnet", **no_segmentation}, "loss": plain},
        }
    )
