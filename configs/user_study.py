"""SGE of USER, 3SHNet, VSE-infinity and 3SHNet with queues under one recipe, `configs/user_study.py:DATA`.

DATA: flickr8k (default), the recipe of shnet.py:hybrid,flickr8k | scenes, that of scenes.py.
"""

from ml_collections import ConfigDict

from configs import scenes, shnet
from configs.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """`--mode=study` trains the four arms, `--config.study.only` others; needs what the recipe needs.

    SGE has the norm for any number of units, as regions are dropped; keys follow within a short run.
    """
    (data,) = choose(variant, ("flickr8k", "scenes"))
    c = scenes.get_config() if data == "scenes" else shnet.get_config("hybrid,flickr8k")
    c.name = f"USER and 3SHNet, one recipe, {data}"
    c.model.user.norm = "layer"
    c.momentum.decay = 0.99
    c.momentum.warm = True
    c.momentum.start = "gaussian"
    # Earlier, keys age too fast to learn against (docs/results.md).
    c.momentum.from_epoch = 0.4 * c.train.get_ref("epochs")
    off = {"semantic": False, "spatial": False, "scene_tokens": False, "category_token": False}
    c.study.seeds = (0, 1, 2)
    c.study.arms = ConfigDict()
    c.study.arms.user = ConfigDict({"model": {"name": "user"}})
    c.study.arms.shnet = ConfigDict({})
    c.study.arms.vse_infinity = ConfigDict({"model": off})
    queues = {"momentum": {"queue": 2048}}
    c.study.arms.shnet_queues = ConfigDict(queues)
    c.study.only = tuple(c.study.arms)
    c.study.compare = (
        *("user - vse_infinity", "user - shnet", "shnet - vse_infinity", "shnet_queues - shnet", "shnet_queues - user"),
        *("vse_infinity_queues - vse_infinity", "vse_infinity_32_queues - vse_infinity_32"),
    )
    c.study.arms.user_queues = ConfigDict({"model": {"name": "user"}} | queues)
    objective = {"weights": {"infonce": 0.0, "uto": 1.0}, "uto": {"batch_weight": 20.0}}
    c.study.arms.user_uto = ConfigDict({"model": {"name": "user"}, "loss": objective} | queues)
    small = {"train": {"batch_size": 32}}  # what queues gain where a batch holds few negatives of its own
    c.study.arms.vse_infinity_32 = ConfigDict({"model": off} | small)
    c.study.arms.vse_infinity_32_queues = ConfigDict({"model": off} | small | queues)
    c.study.arms.vse_infinity_queues = ConfigDict({"model": off} | queues)
    return c
