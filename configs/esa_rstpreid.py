"""ESA-style on RSTPReid: as CUHK-PEDES."""

from ml_collections import ConfigDict

from configs import esa_cuhk_pedes


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` (data_prep.from_person_search) and `--config.text.weights`, a CLIP ViT-B/16 folder."""
    c = esa_cuhk_pedes.get_config()
    c.name = "ESA-style, RSTPReid"
    return c
