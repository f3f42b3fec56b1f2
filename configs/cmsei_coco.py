"""CMSEI-style on COCO with bottom-up-attention regions, their boxes and a scene graph: settings by analogy."""

from typing import Any

from ml_collections import ConfigDict

from configs import base

COMPARE = ("full - no_semantic_graph", "full - no_spatial_graph", "full - no_interaction", "full - vse_infinity")


def get_config() -> ConfigDict:
    """Needs `data.dir` with boxes (docs/models.md) and `text.weights`; the paper's values are not known to us.

    Optimiser, margin and batch by analogy with VSE-infinity and SCAN.
    """
    c = base.get_config()
    c.name = "CMSEI-style"
    c.model.name = "cmsei"
    c.model.cmsei.block = 256
    c.loss.weights.global_triplet = 1.0
    c.loss.triplet.warmup_epochs = 0.0  # every pair would need a backward pass; the global vectors warm up
    c.train.batch_size = 128
    c.train.epochs = 30.0
    c.eval.two_stage = 128
    c.study.compare = COMPARE
    c.study.arms = arms({"triplet": {"warmup_epochs": 1.0}})
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
