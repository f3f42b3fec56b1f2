"""VSE-infinity, `configs/vse.py:DATA`: shnet.py on regions without anything that a segmentation says.

DATA: coco (default) | f30k.
"""

from ml_collections import ConfigDict

from configs import shnet
from configs.variants import choose


def get_config(variant: str = "") -> ConfigDict:
    """Needs `--config.data.dir` with regions and captions alone, and `--config.text.weights` (bert-base-uncased)."""
    (data,) = choose(variant, ("coco", "f30k"))
    c = shnet.get_config(data)
    c.name = f"VSE-infinity region, {data}"
    c.model.update(c.study.arms.none.model)
    c.study.arms = ConfigDict({"full": {}})
    c.study.compare = ()
    return c
