"""ESA-style on ICFG-PEDES, which has no validation split: the last state is evaluated."""

from ml_collections import ConfigDict

from configs import esa_cuhk_pedes


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` and `--config.text.weights`, as CUHK-PEDES.

    Import it with `--hold_out=100`: the persons held out are watched while training (split val) and choose nothing.
    """
    c = esa_cuhk_pedes.get_config()
    c.name = "ESA-style, ICFG-PEDES"
    c.eval.checkpoint = "last"
    return c
