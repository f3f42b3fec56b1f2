"""The scaling study on a laptop: virtual devices, VSE-infinity made small, random batches, minutes on 2 cores."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """`--mode=scale`; `--config.scale.dtypes="('float32', 'bfloat16')"` takes twice as long.

    Accelerators deserve a model of full size: give the configuration that you train instead.
    """
    c = base.get_config()
    c.name = "VSE-infinity, small"
    c.data.max_tokens = 16
    c.data.token_buckets = (16,)
    c.plan.regions = 8
    c.plan.region_dim = 256
    c.model.dim = 128
    c.model.semantic = c.model.spatial = c.model.scene_tokens = c.model.category_token = False
    c.text.tower = "transformer"
    c.text.vocab_size = 4000
    c.text.layers = 1
    c.text.width = 128
    c.text.heads = 4
    c.text.mlp_dim = 256
    c.text.max_positions = 32
    c.loss.weights.infonce = 1.0
    c.loss.weights.triplet = 0.0
    c.loss.pairs.tile = 32
    c.scale.pairs_per_device = (16,)
    c.scale.batch_sizes = (64,)
    c.scale.dtypes = ("float32",)
    c.scale.steps = 10
    return c
