"""Runs every test on CPU with 8 virtual devices; must come before the first import of jax.

Property tests try the same examples in every run: a test fails where somebody changed something, and nowhere else.
"""

import os

from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")
