"""ESA-style embedding sets, `configs/esa.py:DATA`.

Person search: people (default), rendered figures | cuhk_pedes | icfg_pedes | rstpreid. Photographs: flickr8k | frozen,
on the tokens of a frozen CLIP that lie in the records.
"""

from ml_collections import ConfigDict

from configs import base, shnet
from configs.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """People needs `shnet data people --out=data_sets` alone, Flickr8k what shnet.py:flickr8k needs.

    The others need `--config.data.dir` and `--config.text.weights`, a CLIP ViT-B/16 folder (docs/models.md).
    """
    recipes = {"people": people, "cuhk_pedes": cuhk_pedes, "icfg_pedes": icfg_pedes, "rstpreid": cuhk_pedes}
    recipes |= {"flickr8k": flickr8k, "frozen": frozen}
    (data,) = choose(variant, tuple(recipes))
    c = recipes[data]()
    c.name = f"ESA-style, {data}"
    c.model.name = "esa"
    return c


def people() -> ConfigDict:
    """Rendered figures, without downloads; arms: set or merge head, global vectors alone, fixed margin."""
    c = base.get_config()
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
    c.model.units = ("grid",)
    c.model.dim = 256
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


def cuhk_pedes() -> ConfigDict:
    """CLIP ViT-B/16 fine-tuned from 384 x 128 pictures, hyper-parameters of IRRA (CVPR 2023).

    AdamW in place of Adam with decay in the gradient, and one learning rate for weights and biases: ours.
    """
    c = people()
    c.data.dir = ""
    c.data.resident = False
    c.data.captions_per_image = 1
    c.data.max_tokens = 77
    c.data.token_buckets = (32, 48, 77)
    c.data.word_change = 0.0
    c.tokenizer.kind = "clip"
    c.text.tower = "clip"
    c.text.width = 512
    c.text.heads = 8
    c.text.mlp_dim = 2048
    c.text.max_positions = 77
    c.model.dim = 512
    c.model.esa.source = "picture"
    c.model.esa.head = "none"
    c.model.esa.depth = 4
    c.loss.weights.infonce = 0.0
    c.loss.weights.sdm = 1.0
    c.optim.lr = 5e-5  # of what is new; CLIP's own parameters a fifth, 1e-5 (IRRA)
    c.optim.text_lr_factor = 0.2
    c.optim.weight_decay = 4e-5
    c.optim.decay_all = False
    c.optim.clip_norm = 0.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 5.0
    c.train.batch_size = 64
    c.train.epochs = 60.0
    return c


def icfg_pedes() -> ConfigDict:
    """As CUHK-PEDES; it has no validation split, so the last state is evaluated.

    Import it with `--hold_out=100`: the persons held out are watched while training (split val) and choose nothing.
    """
    c = cuhk_pedes()
    c.eval.checkpoint = "last"
    return c


def frozen() -> ConfigDict:
    """The tokens of a frozen CLIP from records (data_prep.extract with --tokens=projected): only the set heads learn.

    The recipe is ours: no paper trains so. Another CLIP than ViT-B/16: set model.dim to its projection_dim and
    text.frozen_layers to the layers of its text tower.
    """
    c = cuhk_pedes()
    c.text.frozen_layers = 12
    c.model.esa.source = "units"
    c.loss.weights.sdm = 0.0  # global vectors are those of the frozen CLIP, so a loss on them alone teaches nothing
    c.loss.weights.identity = 0.0
    c.loss.weights.infonce = 1.0
    c.optim.lr = 1e-3
    c.optim.warmup_epochs = 0.5
    c.train.batch_size = 256
    c.train.epochs = 20.0
    c.eval.person = False
    c.study.only = ()
    c.study.compare = ("slot - merge",)
    c.study.arms = arms = ConfigDict()
    arms.slot = ConfigDict({})
    arms.merge = ConfigDict({"model": {"esa": {"mode": "merge"}}})
    return c


def flickr8k() -> ConfigDict:
    """Sets on regions, grid and words of flickr8k_mini against VSE-infinity: the recipe of shnet.py."""
    c = shnet.get_config("hybrid,flickr8k")
    c.loss.weights.diversity = 0.01
    c.study.arms = arms = ConfigDict()
    plain = {"model": {"esa": {"size": 0, "text_size": 0}}, "loss": {"weights": {"diversity": 0.0}}}
    arms.set = ConfigDict({})
    arms.set_margin = ConfigDict({"loss": {"weights": {"asm": 1.0}}})
    arms.vse_infinity = ConfigDict(plain)
    c.study.compare = ("set - vse_infinity", "set_margin - vse_infinity")
    return c
