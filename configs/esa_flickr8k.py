"""ESA-style sets on regions, grid and words of flickr8k_mini against VSE-infinity: the recipe of shnet_flickr8k.py."""

from ml_collections import ConfigDict

from configs import esa_people, shnet_flickr8k


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` (docs/data.md, from_scan) and `make minilm`."""
    c = shnet_flickr8k.get_config()
    people = esa_people.get_config()
    c.name = "ESA-style, regions and grid"
    c.model.name = "esa"
    c.model.esa = people.model.esa
    c.model.clip = people.model.clip
    c.loss.weights.diversity = 0.01
    c.study.arms = arms = ConfigDict()
    plain = {"model": {"esa": {"size": 0, "text_size": 0}}, "loss": {"weights": {"diversity": 0.0}}}
    arms.set = ConfigDict({})
    arms.set_margin = ConfigDict({"loss": {"weights": {"asm": 1.0}}})
    arms.vse_infinity = ConfigDict(plain)
    c.study.compare = ("set - vse_infinity", "set_margin - vse_infinity")
    return c
