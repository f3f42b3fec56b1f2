"""Old place of `modes.cross`."""

from shnet_jax.modes.cross import cross, rsums

__all__ = ["cross", "rsums"]
