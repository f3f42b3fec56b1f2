"""3SHNet region on the rendered scenes: nothing to download."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Needs `shnet data scenes --out=data_sets`; 4 minutes an arm on 2 cores."""
    c = base.get_config()
    c.name = "3SHNet region"
    c.data.dir = "data_sets/scenes"
    c.data.resident = True
    c.data.captions_per_image = 5
    c.data.max_tokens = 48
    c.data.token_buckets = (32, 48)
    c.tokenizer.kind = "sentencepiece"
    c.model.dim = 256
    c.model.num_classes = 22
    c.model.map_channels = 64
    c.model.dtype = c.text.dtype = "auto"
    c.text.tower = "bigru"
    c.text.width = 256
    c.loss.weights.infonce = 1.0
    c.loss.weights.triplet = 0.0
    c.optim.lr = 1e-3
    c.train.batch_size = 320
    c.train.epochs = 5.0
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 0.5
    c.study.only = ("full", "none")
    return c
