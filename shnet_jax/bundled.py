"""Folders that belong to the project but not to the package: `configs` and `data_prep`.

A checkout has them beside `shnet_jax`. A wheel has them in `shnet_jax/_bundled`: it installs one top-level name.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax.paths import expand

_PACKAGE = Path(__file__).parent
ROOT = _PACKAGE / "_bundled" if (_PACKAGE / "_bundled").is_dir() else _PACKAGE.parent
"""Folder that holds `configs` and `data_prep`."""
CONFIGS = ROOT / "configs"


def make_importable() -> None:
    """Puts the bundled folders first on the import path, so that `from configs import base` works from any folder."""
    if str(ROOT) not in sys.path[:1]:
        sys.path.insert(0, str(ROOT))


def config_path(text: str) -> str:
    """The file of a configuration, with its argument: "demo" is the bundled configs/demo.py, a path is that file.

    text: NAME or PATH, each with an optional ":ARGUMENT" for the file's get_config.
    Raises ValueError that names near files when there is none.
    """
    name, colon, argument = expand(text).partition(":")
    path = Path(name)
    parts = expand(text).split(":")
    if any(Path(":".join(parts[:count])).is_file() for count in range(2, len(parts) + 1)):
        # ml_collections takes what follows the first colon for an argument.
        raise ValueError(f"--config={text}: expected a path without ':'; copy the file, or call it by a relative path")
    if path.is_file():
        return f"{name}{colon}{argument}"
    relative = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    bundled = CONFIGS / relative.with_suffix(".py")
    if not path.is_absolute() and bundled.is_file():
        return f"{bundled}{colon}{argument}"
    names = sorted(file.stem for file in CONFIGS.glob("*.py") if file.stem != "__init__")
    beside = sorted(str(file) for file in path.parent.glob("*.py")) if path.suffix == ".py" else []
    near = difflib.get_close_matches(path.stem, names, n=3) + difflib.get_close_matches(name, beside, n=3)
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"bundled: {', '.join(names)}"
    raise ValueError(f"--config={text}: no such file, and no bundled configuration of that name; {hint}")


def get_config(text: str) -> ConfigDict:
    """The configuration of a bundled name or of a file, as `--config` takes it. Raises ValueError without one."""
    name, colon, argument = config_path(text).partition(":")
    make_importable()
    spec = importlib.util.spec_from_file_location(f"config_{Path(name).stem}", name)
    if spec is None or spec.loader is None:
        raise ValueError(f"{name}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{name}: expected a configuration with a function get_config, found none")
    if colon and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"--config={text}: expected --config={text.partition(':')[0]}, which has no variants")
    try:
        return module.get_config(argument) if colon else module.get_config()
    except ValueError as error:
        raise ValueError(f"--config={text}: {error}") from error
