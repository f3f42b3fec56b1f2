"""Old place of `report`."""

from shnet_jax.evaluate.report import comparison_table

__all__ = ["comparison_table"]
