"""ESA-style person search on rendered figures (`python -m data_prep.people`): sets on grid cells and words."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """ESA without downloads; arms: set or merge head, global vectors alone, fixed margin. See docs/models.md."""
    c = base.get_config()
    c.name = "ESA-style, rendered people"
    c.data.dir = "data_sets/people"
    c.data.resident = True
    c.data.captions_per_image = 2
    c.data.max_tokens = 40
    c.data.token_buckets = (32, 40)
    c.data.word_change = 0.1
    c.data.word_mask = 0.0
    c.data.word_random = 0.0
    c.data.word_delete = 1.0
    c.tokenizer.kind = "sentencepiece"
    c.text.tower = "bigru"
    c.text.width = 256
    c.model.name = "esa"
    c.model.units = ("grid",)
    c.model.dim = 256
    c.model.esa = esa = ConfigDict()
    esa.source = "units"  # what the image tower reads: "units" of the record | "picture", by CLIP's vision tower
    esa.head = "learned"  # "learned": linear, MLP and GPO over units and words | "none": tokens as a CLIP gives them
    esa.size = 4  # elements of an image's set (DivE 4); 0: global vectors alone, the plain model
    esa.text_size = 4  # elements of a caption's set; may differ; 0 with size 0
    esa.mode = "slot"  # how tokens become elements: slots that compete for them | "merge", soft clusters
    esa.depth = 2  # rounds of slot attention, which share their weights (DivE 4)
    esa.heads = 4  # attention heads of the slots (DivE 4)
    esa.similarity = "smooth_chamfer"  # of two sets: smooth_chamfer | chamfer | max | mean
    esa.sharpness = 16.0  # of smooth_chamfer (DivE 16)
    esa.eta = 1.0  # weight of the set term beside the cosine of the global vectors (ours 1)
    c.model.clip = clip = ConfigDict()  # vision tower of source "picture"; its sizes are set by the folder text.weights
    clip.grid = (14, 14)  # patches that the positions were learned for; other pictures interpolate them
    clip.patch = 16  # pixels of a side of a patch
    clip.layers = 12  # transformer layers
    clip.width = 768  # hidden size
    clip.heads = 12  # attention heads
    clip.mlp_dim = 3072  # hidden size of the MLP
    clip.projection = 512  # size of the joint space
    clip.activation = "quick_gelu"  # quick_gelu | gelu
    clip.remat = False  # layers are computed again in the backward pass instead of kept
    c.model.dtype = c.text.dtype = "auto"
    c.loss.weights.triplet = 0.0
    c.loss.weights.infonce = 1.0  # sdm stays on its plateau when the towers are not pretrained
    c.loss.weights.identity = 1.0
    c.loss.weights.asm = 1.0
    c.loss.weights.diversity = 0.01
    c.optim.lr = 1e-3
    c.optim.text_lr_factor = 1.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 0.5
    c.train.batch_size = 128
    c.train.epochs = 6.0
    c.eval.person = True
    c.study.seeds = (0, 1, 2)
    c.study.only = ("set_adaptive", "set_fixed", "global_adaptive", "global_fixed")
    c.study.compare = (
        *("set_adaptive - global_adaptive", "set_fixed - global_fixed"),
        *("set_adaptive - set_fixed", "global_adaptive - global_fixed"),
        *("set_adaptive - set_larger", "set_adaptive - merge_adaptive"),
    )
    c.study.arms = arms = ConfigDict()
    no_set, no_set_loss = {"esa": {"size": 0, "text_size": 0}}, {"diversity": 0.0}
    arms.set_adaptive = ConfigDict({})
    arms.set_fixed = ConfigDict({"loss": {"asm": {"scale": 0.0}}})
    arms.set_larger = ConfigDict({"loss": {"asm": {"sign": 1}}})
    arms.merge_adaptive = ConfigDict({"model": {"esa": {"mode": "merge"}}})
    arms.global_adaptive = ConfigDict({"model": no_set, "loss": {"weights": no_set_loss, "asm": {"of": "score"}}})
    arms.global_fixed = ConfigDict(
        {"model": no_set, "loss": {"weights": no_set_loss, "asm": {"of": "score", "scale": 0.0}}}
    )
    return c
