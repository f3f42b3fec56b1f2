"""Names to modules. A model or loss is found by the name of its file; importing this has no side effect.

`registry.model("shnet")` is `shnet_jax.models.shnet`; a dotted name (`my_package.my_model`) is taken as it is, so a
model outside this package needs no edit here.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def _find(package: str, name: str, kind: str) -> ModuleType:
    path = name if "." in name else f"{package}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # the module exists but one of its own imports does not
            raise
        known = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module(package).__path__))
        raise ValueError(f"unknown {kind} {name!r}: no module {path}; {package} has {', '.join(known)}") from None


def model(name: str) -> ModuleType:
    """The module of a model: has `build(config) -> flax.linen.Module` and `image_fields(config) -> tuple[str, ...]`."""
    return _find("shnet_jax.models", name, "model")


def loss(name: str) -> ModuleType:
    """The module of a loss: has `init_params(**options)` and `loss(images, texts, ids, ctx, **options) -> dict`."""
    return _find("shnet_jax.losses", name, "loss")
