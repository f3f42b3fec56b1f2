"""Runs every test on CPU with 8 virtual devices; must come before the first import of jax.

Programs here run once or twice, so they are compiled fast and badly, and each once, also in the processes that tests
start: LLVM optimises nothing, and XLA's emitters of fusions, which take two thirds of a compilation, are off. XLA's own
passes are those of users: a program has the same operations, collectives and, within 0.1 %, temporaries. All as users
have it: `JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test`.
The garbage collector runs seldom: while JAX traces it looks at millions of objects, and finds nothing.
A program that a killed process left half written among those that are kept is a warning, and compiled again.
Property tests try the same examples in every run: a test fails where somebody changed something, and nowhere else.
"""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.compiling import COLLECT_AFTER, xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers share it
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8, quick)}".strip()
    compiled = tempfile.mkdtemp(prefix="shnet_jax_compiled_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

gc.set_threshold(*COLLECT_AFTER)

settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that the workers end together; first of all the TPU compiler's.

    A process that holds no other programs yet has the 2 GB that it takes.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_plan_tpu.py", item.path not in slow))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """A process that holds more than 1.5 GB after a file forgets the programs that it has compiled."""
    yield
    statm = Path("/proc/self/statm")
    if "jax" in sys.modules and statm.exists():
        held = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if held > 1.5 * 2**30:
            sys.modules["jax"].clear_caches()
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)  # glibc would keep what is free
