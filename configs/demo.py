"""Configuration of `make demo`: the recipe of `scenes.py` with half the width of text and map, evaluated twice."""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """Needs `shnet data scenes --out=data_sets`; both arms take about 4 minutes of CPU time on an AMD EPYC."""
    c = scenes.get_config()
    c.text.width = 128  # with the next line an epoch of 3SHNet takes 36 instead of 50 s of CPU time
    c.model.map_channels = 32
    c.train.eval_epochs = 2.5  # an evaluation takes seconds of a demo, and changes no parameter
    return c
