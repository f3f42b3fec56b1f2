"""Image-sentence retrieval from precomputed visual features, in JAX and Flax.

import shnet_jax

model = shnet_jax.load("runs/demo/full/seed_0")
for hit in model.search("a red star above the sea")[0].hits:
    print(hit.rank, hit.score, hit.image_id)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shnet_jax.api import Retriever, load

__all__ = ["Retriever", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `Retriever`, imported when they are asked for: importing the package alone costs nothing."""
    if name in __all__:
        from shnet_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
