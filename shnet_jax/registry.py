"""Registry of models and losses, which are found by the names of their files; importing it has no side effect.

`registry.model("shnet")` is `shnet_jax.models.shnet`; a dotted name (`my_package.my_model`) is taken as it is, so a
model outside this package needs no edit here. The configuration in somebody's folder is not asked for such names: see
`check_known`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from types import ModuleType


def _find(package: str, name: str, kind: str, function: str) -> ModuleType:
    """The module of a model or loss. function: that every one of them defines, for the message that lists them."""
    path = name if "." in name else f"{package}.{name}"
    try:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ModuleNotFoundError(name=path)
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # the module exists but one of its own imports does not
            raise
        files = (file for folder in importlib.import_module(package).__path__ for file in Path(folder).glob("*.py"))
        known = sorted(file.stem for file in files if f"\ndef {function}(" in file.read_text(encoding="utf-8"))
        raise ValueError(f"unknown {kind} {name!r}: no module {path}; {package} has {', '.join(known)}") from None


def model(name: str) -> ModuleType:
    """The module of a model: has `build(config) -> flax.linen.Module` and `image_fields(config) -> tuple[str, ...]`."""
    return _find("shnet_jax.models", name, "model", "image_fields")


def loss(name: str) -> ModuleType:
    """The module of a loss: `loss(images, texts, ids, ctx, **options) -> dict`, `init_params` where it learns."""
    return _find("shnet_jax.losses", name, "loss", "loss")


def check_known(names: Iterable[str], where: str, own: Collection[str] = ()) -> None:
    """Raises ValueError for a dotted name that is neither in `own`, the user's configuration, nor imported already.

    Importing a module runs it: opening a model of somebody else must not run modules that its folder names.
    where: the file that has the names, for the message.
    """
    for name in names:
        if "." in name and name not in own and name not in sys.modules:
            raise ValueError(
                f"{where} names the module {name!r}, which is not a part of shnet_jax and would be run. If you trust "
                f"it, name it in your own --config, or `import {name}` in that file or before the call"
            )
