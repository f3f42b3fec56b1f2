"""Runs every test on CPU with 8 virtual devices; must come before the first import of jax.

Programs here run once or twice, so they are compiled fast and badly, and each once, also in the processes that tests
start. As users have them: `JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test`.
A program that a killed process left half written among those that are kept is a warning, and compiled again.
Property tests try the same examples in every run: a test fails where somebody changed something, and nowhere else.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers share it
    compiled = tempfile.mkdtemp(prefix="shnet_jax_compiled_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


@pytest.fixture
def optimised() -> Iterator[None]:
    """For what is asked of the compiler: its memory and its work are those of the programs that users run.

    Whatever other tests have compiled is forgotten before, and what this one compiles after it.
    """
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
