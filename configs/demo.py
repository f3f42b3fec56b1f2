"""Configuration of `make demo`: the recipe of `scenes.py`."""

from ml_collections import ConfigDict

from configs import scenes


def get_config() -> ConfigDict:
    """Needs `shnet data scenes --out=data_sets`."""
    return scenes.get_config()
