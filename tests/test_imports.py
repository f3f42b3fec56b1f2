"""The direction of imports: who may know whom, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The parts of shnet_jax and what each may import of the others, beside COMMON, which know none.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "registry": set(),
    "untrusted": set(),
    "paths": set(),
    "bundled": set(),
    "durations": set(),
    "storage": set(),
    "locks": set(),
    "ops": set(),
    "models": {"ops"},
    "parallel": set(),
    "losses": {"parallel"},
    "data": set(),
    "observe": {"parallel"},  # only the type of a mapped step
    "interop": {"models", "data", "observe"},  # data: what lies in a model folder; observe: atomic writes
    "mirror": {"observe", "parallel"},
    "experiment": {"models", "data", "interop", "observe"},  # the parts of a run, put together from its configuration
    "evaluation": {"models", "data", "parallel", "observe", "experiment"},
    "retrieve": {"models", "data", "parallel", "observe", "experiment", "evaluation"},
    "training": {"models", "losses", "data", "parallel", "observe", "interop", "experiment", "evaluation"},
}
COMMON = {"types", "registry", "untrusted", "paths", "bundled", "durations", "storage", "locks"}
# What a command line calls: may import every part, no part may import it.
ENTRY = {"__main__", "api", "cli", "modes", "plan", "scaling", "stored_config"}

# What a folder may import of the whole project.
REACH = {
    "shnet_jax": {"shnet_jax"},
    "data_prep": {
        *("data_prep", "shnet_jax.data", "shnet_jax.untrusted", "shnet_jax.paths"),
        *("shnet_jax.observe.files", "shnet_jax.observe.progress", "shnet_jax.observe.table"),
        *("shnet_jax.retrieve.embeddings", "shnet_jax.retrieve.tensors"),  # what --mode=embed writes, taken as a source
        "shnet_jax.observe.terminal",
        *("shnet_jax.interop.torch_file", "shnet_jax.interop.torch_pickle", "shnet_jax.interop.sentence_vectors"),
    },
    "configs": {"configs"},
}
# What single files may import beside that.
REACH_OF_FILE = {  # commands from photographs to a search
    "shnet_jax/modes/photos.py": {"data_prep.extract"},
    "shnet_jax/modes/photo_query.py": {"data_prep.extract"},
}
PROJECT = {"shnet_jax", "data_prep", "configs", "tests", "benchmarks", "main"}

# What only these files may import or name; "" stands for no file.
ONLY_IN = {
    "tensorflow": ("",),
    "fsspec": ("shnet_jax/storage.py",),
    "torch": ("shnet_jax/interop/*", "data_prep/extract*", "benchmarks/align.py", "benchmarks/published.py"),
    "torchvision": ("shnet_jax/interop/*", "data_prep/extract*"),
    "orbax": ("shnet_jax/training/checkpoint.py",),
    "pmap": ("shnet_jax/parallel/mapping.py",),
    "shard_map": ("shnet_jax/parallel/mapping.py",),
}


def imports(nodes: Iterable[ast.AST], package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file of that package."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "import_module":
                yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def breaches(path: str, source: str) -> list[str]:
    """What a file breaks, as "file:line: rule"; `path` is relative to the repository, with slashes."""
    nodes = list(ast.walk(ast.parse(source)))
    folder, *rest = path.removesuffix(".py").split("/")
    found: dict[str, None] = {}  # in order, each once

    def breach(line: int, text: str) -> None:
        found[f"{path}:{line}: {text}"] = None

    if folder == "shnet_jax" and rest[0] not in ALLOWED.keys() | ENTRY | {"__init__"}:
        breach(1, f"shnet_jax.{rest[0]} is no part of the plan: say in {Path(__file__).name} what it may import")
    for line, name in imports(nodes, ".".join([folder, *rest][:-1])):
        top, *inner = name.split(".")
        for only, places in ONLY_IN.items():
            if only in (top, inner[-1] if inner else "") and not any(fnmatch(path, p) for p in places):
                breach(line, f"imports {name}; {only} belongs in {' or '.join(p or 'no file' for p in places)}")
        if top not in PROJECT:
            continue
        reach = REACH.get(folder, PROJECT) | REACH_OF_FILE.get(path, set())
        if not any(f"{name}.".startswith(f"{allowed}.") for allowed in reach):
            breach(line, f"imports {name}; {folder} may import only {', '.join(sorted(reach))}")
        if folder == top == "shnet_jax" and rest[0] in ALLOWED:
            allowed = {rest[0]} | ALLOWED[rest[0]] | COMMON
            part = inner[0] if inner else ""
            if part not in allowed:
                breach(line, f"imports {name}; {rest[0]} may import only {', '.join(sorted(allowed))}")
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in ("pmap", "shard_map"):
            places = ONLY_IN[node.attr]
            if path not in places:
                breach(node.lineno, f"names {ast.unparse(node)}; it belongs in {places[0]}")
    return list(found)


def files() -> list[Path]:
    folders = ("shnet_jax", "data_prep", "configs", "benchmarks")
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))] + sorted(ROOT.glob("main.py"))


def test_imports_run_one_way():
    found = [b for p in files() for b in breaches(p.relative_to(ROOT).as_posix(), p.read_text("utf-8"))]
    assert not found, "imports against the plan:\n" + "\n".join(found)


def test_tests_need_neither_torch_nor_tensorflow():
    """Scripts in golden/ make recordings by hand; nothing imports them."""
    for path in sorted(p for p in (ROOT / "tests").rglob("*.py") if "golden" not in p.parts):
        text = path.read_text("utf-8")
        if "torch" not in text and "tensorflow" not in text:  # parsing takes most of the time
            continue
        for line, name in imports(ast.walk(ast.parse(text)), "tests"):
            assert name.split(".")[0] not in ("torch", "tensorflow"), f"{path}:{line} imports {name}"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("shnet_jax/models/a.py", "from shnet_jax.losses import triplet"),
        ("shnet_jax/models/a.py", "import shnet_jax.parallel.axis"),
        ("shnet_jax/losses/a.py", "from ..models import shnet"),
        ("shnet_jax/losses/a.py", "def f():\n  from shnet_jax import models"),
        ("shnet_jax/ops/a.py", "from shnet_jax.models.contract import RetrievalModel"),
        ("shnet_jax/data/a.py", "from shnet_jax.training import loop"),
        ("shnet_jax/observe/a.py", "from shnet_jax.training import loop"),
        ("shnet_jax/evaluation/a.py", "from shnet_jax.retrieve.index import Index"),
        ("shnet_jax/training/a.py", "from shnet_jax.modes.train import train"),
        ("shnet_jax/types.py", "from shnet_jax.ops import norms"),
        ("shnet_jax/data/a.py", "from data_prep.schema import Record"),
        ("shnet_jax/training/a.py", "import importlib\nimportlib.import_module('configs.base')"),
        ("shnet_jax/api.py", "import tests.parity"),
        ("data_prep/a.py", "from shnet_jax.models import text"),
        ("shnet_jax/data/a.py", "import tensorflow as tf"),
        ("shnet_jax/interop/a.py", "from tensorflow import io"),
        ("shnet_jax/models/a.py", "import torch.nn"),
        ("shnet_jax/training/state.py", "import orbax.checkpoint as ocp"),
        ("shnet_jax/training/step.py", "import jax\njax.pmap(f)"),
        ("shnet_jax/training/step.py", "from jax import shard_map"),
        ("shnet_jax/training/step.py", "from jax.experimental.shard_map import shard_map"),
        ("shnet_jax/surprise.py", ""),
    ],
)
def test_a_breach_is_found(path, source):
    found = breaches(path, source)
    assert len(found) == 1 and found[0].startswith(f"{path}:{source.count(chr(10)) + 1}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("shnet_jax/models/a.py", "from shnet_jax.ops import norms\nfrom .text import Tower\nimport jax"),
        ("shnet_jax/data/a.py", "import tensorflow_datasets as tfds"),
        ("shnet_jax/training/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("shnet_jax/interop/torch_weights.py", "import torch"),
        ("shnet_jax/parallel/mapping.py", "import jax\njax.shard_map, jax.pmap"),
        ("shnet_jax/training/a.py", "from shnet_jax.evaluation import rank\nMAPPING = 'pmap'"),
        ("data_prep/a.py", "from shnet_jax.data.records import open_dataset\nfrom data_prep import schema"),
        ("main.py", "from shnet_jax.modes.train import train\nfrom configs import base"),
    ],
)
def test_what_the_plan_allows_is_no_breach(path, source):
    assert breaches(path, source) == []
