"""Image-sentence retrieval from precomputed visual features, in JAX and Flax.

import shnet_jax

model = shnet_jax.load("runs/demo/full/seed_0")
for hit in model.search("a red star above the sea")[0].hits:
    print(hit.rank, hit.score, hit.image_id)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shnet_jax.api import Retriever, evaluate, get_config, load, open_dataset, study, train

__version__ = "0.1.0"
_LAZY = ("Retriever", "evaluate", "get_config", "load", "open_dataset", "study", "train")
__all__ = ["Retriever", "__version__", "evaluate", "get_config", "load", "open_dataset", "study", "train"]


def __getattr__(name: str) -> Any:
    """A name of `shnet_jax.api`, imported when it is asked for: importing the package alone costs nothing."""
    if name in _LAZY:
        from shnet_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
