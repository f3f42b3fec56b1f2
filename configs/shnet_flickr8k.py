"""3SHNet on regions and grid of flickr8k_mini (1,250 training images) with the MiniLM text tower of `make minilm`."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` (docs/results.md) and `make minilm`.

    Contrastive on two captions of 128 images at once; the pretrained text tower stays as it is.
    """
    c = base.get_config()
    c.name = "3SHNet, regions and grid"
    c.data.resident = True
    c.data.captions_per_image = 2
    c.data.max_tokens = 24
    c.data.token_buckets = (24,)
    c.data.word_mask = 0.0  # a frozen tower knows no mask tokens: altered words are deleted
    c.data.word_random = 0.0
    c.data.word_delete = 1.0
    c.text.weights = "minilm"
    c.text.dtype = c.model.dtype = "auto"
    c.text.frozen_layers = 6
    c.model.units = ("regions", "grid")
    c.model.dim = 512
    c.loss.weights.infonce = 1.0
    c.loss.weights.triplet = 0.0
    c.train.batch_size = 256
    c.train.epochs = 6.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 1.0
    c.optim.ema = 0.98
    c.study.seeds = (0, 1, 2)
    return c
