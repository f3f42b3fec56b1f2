"""Old place of `extra_metrics`."""

from shnet_jax.evaluate.extra_metrics import NO_EXTRA_METRICS as NOTHING
from shnet_jax.evaluate.extra_metrics import read_extra_metrics as read_wanted

__all__ = ["NOTHING", "read_wanted"]
