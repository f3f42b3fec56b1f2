"""CMSEI-style on rendered scenes: short captions of small regions, sized for two CPU cores (docs/cmsei.md)."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Needs `python -m data_prep.scenes --out=data_sets`; `--mode=study` compares the arms."""
    c = base.get_config()
    c.name = "CMSEI-style"
    c.data.dir = "data_sets/scenes"
    c.data.resident = True
    c.data.max_tokens = 40
    c.data.token_buckets = (32, 40)
    c.tokenizer.kind = "sentencepiece"
    c.model.name = "cmsei"
    c.model.dim = 128
    c.model.dtype = c.text.dtype = "float32"
    c.text.tower = "bigru"
    c.text.width = 256
    c.loss.weights.global_triplet = 1.0
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_epochs = 0.5
    c.train.batch_size = 64
    c.train.epochs = 3.0
    return c
