"""The arms of user_small.py on the rendered scenes of `make demo`."""

from ml_collections import ConfigDict

from configs import demo, user_small


def get_config() -> ConfigDict:
    """Needs the data set of `make demo`; nothing to download."""
    c = user_small.compared(demo.get_config())
    c.study.seeds = (0, 1, 2)
    return c
