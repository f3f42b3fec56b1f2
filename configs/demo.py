"""What `make demo` trains: `scenes.py` made shorter, two arms in three minutes on two cores."""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """Needs `shnet data scenes --out=data_sets`.

    Two epochs are too few to overfit: nothing is dropped or altered. Without dropout on the words, a step projects the
    small vocabulary once and not every word of its captions.
    """
    c = scenes.get_config()
    c.data.max_tokens = 40
    c.data.token_buckets = (40,)
    c.data.word_change = 0.0
    c.data.region_drop = 0.0
    c.model.dropout = 0.0
    c.text.dropout = 0.0
    c.loss.infonce.temperature = 0.05
    c.optim.lr = 2e-3
    c.optim.text_lr_factor = 1.0  # the text tower is as new as the rest
    c.optim.warmup_epochs = 0.2
    c.train.batch_size = 160
    c.train.epochs = 2.0
    c.train.log_steps = 20
    c.train.eval_epochs = 0.5
    return c
