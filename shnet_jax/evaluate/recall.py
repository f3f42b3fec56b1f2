"""Old place of `metrics`."""

from shnet_jax.evaluate.metrics import CUTS, Metrics, QueryRanks

__all__ = ["CUTS", "Metrics", "QueryRanks"]
