"""A pretrained CLIP or SigLIP on photographs, for `shnet photos`; image_embedding comes from the same model.

Its own vectors: zero_shot (default). A residual head on them, the towers frozen: head.
"""

from ml_collections import ConfigDict

from configs import base
from configs.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """Needs `--config.data.dir` and `--config.text.weights`, a CLIP folder; `shnet photos` fills them in.

    For a SigLIP folder also text.tower and tokenizer.kind "siglip", data.max_tokens 64: `shnet photos` sets them.
    """
    recipes = {"zero_shot": zero_shot, "head": head}
    (recipe,) = choose(variant, tuple(recipes))
    return recipes[recipe]()


def zero_shot() -> ConfigDict:
    """The vectors of the encoder as they are."""
    c = base.get_config()
    c.name = "zero-shot"
    c.data.max_tokens = 77
    c.data.token_buckets = (16, 32, 77)
    c.data.word_change = 0.0
    c.data.word_mask = 0.0
    c.tokenizer.kind = "clip"
    c.text.tower = "clip"
    c.text.max_positions = 77
    c.model.name = "dual"
    return c


def head() -> ConfigDict:
    """The residual head. Set text.frozen_layers to the layers of another text tower than that of ViT-B and L (12).

    The recipe is ours: no paper trains so.
    """
    c = zero_shot()
    c.name = "head"
    c.model.dual.head = "residual"
    c.text.frozen_layers = 12
    c.data.resident = True
    c.loss.weights.triplet = 0.0
    c.loss.weights.infonce = 1.0
    c.loss.infonce.temperature = 0.02
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_percent = 5.0
    c.optim.decay_all = False
    c.optim.weight_decay = 1e-2
    c.train.batch_size = 128
    c.train.epochs = 10.0
    return c
