"""ESA-style sets on the tokens of a frozen CLIP ViT-B/16 that lie in the records: only the set heads learn."""

from ml_collections import ConfigDict

from configs import esa_cuhk_pedes


def get_config() -> ConfigDict:
    """Needs `--config.data.dir` (data_prep.extract with --tokens=projected) and `--config.text.weights`, the same CLIP.

    The recipe is ours: no paper trains so. Another CLIP than ViT-B/16: set model.dim to its projection_dim and
    text.frozen_layers to the layers of its text tower.
    """
    c = esa_cuhk_pedes.get_config()
    c.name = "ESA-style, frozen CLIP"
    c.text.frozen_layers = 12
    c.model.esa.source = "units"
    c.loss.weights.sdm = 0.0  # global vectors are those of the frozen CLIP, so a loss on them alone teaches nothing
    c.loss.weights.identity = 0.0
    c.loss.weights.infonce = 1.0
    c.optim.lr = 1e-3
    c.optim.warmup_epochs = 0.5
    c.train.batch_size = 256
    c.train.epochs = 20.0
    c.eval.person = False
    c.study.only = ()
    c.study.compare = ("slot - merge",)
    c.study.arms = arms = ConfigDict()
    arms.slot = ConfigDict({})
    arms.merge = ConfigDict({"model": {"esa": {"mode": "merge"}}})
    return c
