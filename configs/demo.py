"""Configuration of `make demo`: the models of `scenes.py` with half the width of text and map, trained in 500 steps."""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """Needs `shnet data scenes --out=data_sets`; trains both arms at once, 3 minutes on 2 slow cores."""
    c = scenes.get_config()
    c.text.width = 128
    c.model.map_channels = 32
    c.train.batch_size = 80  # more steps an epoch, in which the recalls rise faster
    c.train.epochs = 2.0
    c.train.eval_epochs = 1.0
    # Two epochs do without. Without dropout the GRU multiplies the 128 words of the vocabulary, not all tokens.
    c.text.dropout = c.data.word_change = c.data.region_drop = 0.0
    c.data.max_tokens = 40  # cuts 3 % of the captions; the GRU has a sixth fewer steps
    c.data.token_buckets = (32, 40)
    c.study.jobs = 2
    return c
