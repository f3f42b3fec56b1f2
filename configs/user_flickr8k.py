"""The published USER (SGE) of Flickr30K, cut to 4 epochs, width 512, bfloat16 products, on flickr8k_mini."""

from ml_collections import ConfigDict

from configs import user_f30k


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` and `make minilm`; compare with user_small.py and shnet_flickr8k_published.py."""
    c = user_f30k.get_config()
    c.name = "USER (SGE), published recipe"
    c.data.resident = True
    c.text.weights = "minilm"
    c.text.dtype = c.model.dtype = "auto"
    c.model.dim = 512
    c.train.epochs = 4.0
    c.train.checkpoint_steps = 50
    c.study.seeds = (0, 1, 2)
    c.study.arms = ConfigDict()
    c.study.arms.user = ConfigDict({})
    c.study.arms.masked = ConfigDict({"loss": {"uto": {"mask_same_image": True}}})
    # Key encoders that follow within a short run: 0.999 keeps 82 % of their initial weights after 192 steps.
    c.study.arms.fast = ConfigDict({"momentum": {"warm": True}})
    c.study.arms.no_queue = ConfigDict({"momentum": {"queue": 0}})
    c.study.only = ("user",)
    c.study.compare = ("masked - user", "fast - user", "user - no_queue")
    return c
