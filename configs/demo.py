"""Configuration of `make demo`: the recipe of `scenes.py`, evaluated twice."""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """Needs `shnet data scenes --out=data_sets`."""
    c = scenes.get_config()
    c.train.eval_epochs = 2.5  # an evaluation takes seconds of a demo, and changes no parameter
    return c
