"""Configuration of `make demo`: the recipe of `scenes.py`, both arms at the same time, evaluated twice."""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """Needs `shnet data scenes --out=data_sets`."""
    c = scenes.get_config()
    c.train.eval_epochs = 2.5
    c.study.jobs = 2
    return c
