"""The model card of `shnet export`: README.md with the front matter of a model hub."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import shnet_jax
from shnet_jax.data.checksums import CHECKSUMS, sha256
from shnet_jax.evaluation.protocols import Results
from shnet_jax.evaluation.report import card_table, from_dict, table
from shnet_jax.modes.convert import Model, describe
from shnet_jax.observe.table import Table
from shnet_jax.plan.planned_run import PlannedRun
from shnet_jax.untrusted import read_object

log = logging.getLogger(__name__)

CARD = "README.md"
FILL_IN = "TO BE FILLED IN"
SINGLE = "no, a single model"
RECIPE = (
    *("seed", "data.captions_per_image", "data.max_tokens", "model.name", "model.dim", "model.units", "model.dtype"),
    *("text.tower", "text.layers", "text.width", "text.dtype", "loss.pairs.strategy", "optim.name", "optim.lr"),
    *("optim.weight_decay", "train.batch_size", "train.steps", "train.epochs"),
)
"""Fields of the configuration in the card; config.json has all."""


@dataclasses.dataclass(frozen=True)
class About:
    """The subject of a card.

    run: the model with its data set. license: of the weights, or "". tokens, onnx: as in programs.json.
    """

    model: Model
    run: PlannedRun
    workdir: Path
    license: str
    tokens: Mapping[str, Any]
    onnx: Mapping[str, Any]


def render(about: About, files: Mapping[str, tuple[int, str]], signatures: Mapping[str, Any]) -> str:
    """The card as Markdown. files: bytes and sha256 by name. signatures: of the programs, as in programs.json."""
    sections = [_front_matter(about), _model(about), _licences(about), _data(about), _recipe(about)]
    sections += [_evaluation(about), _use(about, signatures), *([_onnx(about)] if about.onnx else []), _files(files)]
    return "\n".join(sections)


def _front_matter(about: About) -> str:
    """YAML between lines of dashes; JSON strings are YAML strings."""
    licence = json.dumps(about.license) if about.license else f"unknown  # {FILL_IN}: licence of the weights"
    lines = [f"license: {licence}", "library_name: shnet_jax", "pipeline_tag: feature-extraction"]
    lines += [f"# language: {FILL_IN}: languages of the captions"]
    lines += ["tags:", *(f"- {tag}" for tag in ("image-text-retrieval", "jax", "flax", "stablehlo", "safetensors"))]
    lines += ["- onnx"] if about.onnx else []
    lines += [f"- {json.dumps(about.model.config.model.name)}"]
    lines += ["datasets:", f"- {json.dumps(_dataset(about))}  # name of the imported set; its name on the hub, if any"]
    return "\n".join(["---", *lines, "---", ""])


def _dataset(about: About) -> str:
    return (
        about.run.dataset.path.parent.name if about.run.dataset.splits and about.run.config.data.dir else "not stated"
    )


def _model(about: About) -> str:
    config = about.model.config
    tower = config.text.tower
    return (
        f"# {config.name}\n\nImage-sentence retrieval from precomputed features with "
        f"shnet_jax {shnet_jax.__version__}: {describe(about.model)}. Text side: {tower}.\n"
    )


def _licences(about: About) -> str:
    rows = [
        ["weights", about.license or FILL_IN],
        ["captions and images of the training data", FILL_IN],
        ["model that made the features", FILL_IN],
        ["pretrained text model and its vocabulary, if any", FILL_IN],
    ]
    heading = "## Licences\n\nThe exporter cannot know these. Fill in each field before you publish.\n\n"
    return heading + str(Table("Licences", ["of", "licence"], rows, words=True))


def _data(about: About) -> str:
    dataset, checksums = about.run.dataset, about.workdir / CHECKSUMS
    lines = [f"## Data\n\n- data set: {_dataset(about)}"]
    if about.run.config.data.dir:
        lines += [f"- images: {', '.join(f'{count} {split}' for split, count in dataset.splits.items())}"]
        lines += [f"- source: {_line(dataset.metadata.get('source', 'not stated'))}"]
    lines += [f"- sha256 of its checksums: {sha256(checksums) if checksums.is_file() else 'not stated'}"]
    return "\n".join(lines) + "\n"


def _line(text: Any) -> str:
    """Text of others on one line, without Markdown of its own."""
    return "`" + " ".join(str(text).replace("`", "'").split())[:300] + "`"


def _recipe(about: About) -> str:
    config, rows = about.model.config, []
    for name in RECIPE:
        section, _, field = name.rpartition(".")
        value: Any = config
        for part in filter(None, section.split(".")):
            value = value.get(part, {})
        if field in value:
            rows.append([name, f"{value[field]}"])
    losses = {name: weight for name, weight in config.loss.weights.items() if weight}
    rows.append(["loss.weights", ", ".join(f"{name} {weight:g}" for name, weight in losses.items())])
    rows.append(["step of the checkpoint", str(about.model.step)])
    return "## Recipe\n\nconfig.json has every field.\n\n" + str(Table("Recipe", ["field", "value"], rows, words=True))


def _evaluation(about: About) -> str:
    parts = ["## Evaluation\n"]
    arms = _results(about)
    if not arms:
        return parts[0] + "\nnot evaluated: `shnet eval` on the run writes results that the next export shows.\n"
    for title, results in arms.items():
        parts += [f"### {title}\n", str(table({str(results.card["dataset"]): results})), str(card_table(results.card))]
    return "\n".join(parts)


def _results(about: About) -> dict[str, Results]:
    """Results of this checkpoint alone in the work folder, by the data set, split and protocol."""
    results_by_title = {}
    for path in sorted(about.workdir.glob("results_*.json")):
        try:
            arms = {name: from_dict(fields) for name, fields in read_object(path)["arms"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s: left out of the card, not the results of an evaluation: %s", path, error)
            continue
        for results in arms.values():
            card = results.card
            if card.get("checkpoint_step") == about.model.step and card.get("ensemble") == SINGLE:
                title = [str(card[key]) for key in ("dataset", "split", "protocol", "ranking") if key in card]
                results_by_title[", ".join(title)] = results
    return results_by_title


def _use(about: About, signatures: Mapping[str, Any]) -> str:
    given = {name: entry["shape"] for name, entry in signatures["text"]["inputs"][0].items()}
    arrays = "; ".join(f"`{name}` [{', '.join(map(str, shape))}]" for name, shape in given.items())
    return f"""## Use

With shnet_jax:

```python
import shnet_jax

model = shnet_jax.load("FOLDER")  # data_dir=... for a data set to search
model.encode_texts("a dog on a beach").vector
```

With JAX alone (image.stablehlo, text.stablehlo and score.stablehlo run on cpu, cuda and tpu):

```python
from jax import export
from safetensors.numpy import load_file

weights = load_file("FOLDER/model.safetensors")
text = export.deserialize(open("FOLDER/text.stablehlo", "rb").read())
vectors = text.call(weights, inputs)["vector"]
```

`inputs` is a dictionary: {arrays}. programs.json has names, shapes and dtypes of all programs, and how captions become
tokens.
"""


def _onnx(about: About) -> str:
    def arrays(given: Mapping[str, Any]) -> str:
        return "; ".join(f"`{name}` [{', '.join(map(str, a['shape']))}] {a['dtype']}" for name, a in given.items())

    rows = [[entry["file"], arrays(entry["inputs"]), arrays(entry["outputs"])] for entry in about.onnx.values()]
    return f"""With ONNX Runtime, without JAX; the files hold the weights and compute in float32:

```python
import onnxruntime

text = onnxruntime.InferenceSession("FOLDER/text.onnx")
(vectors,) = text.run(["vector"], inputs)
```

{Table("ONNX", ["file", "inputs", "outputs"], rows, words=True)}
Vectors have unit length. Numbers of images n and of texts t are free.
"""


def _files(files: Mapping[str, tuple[int, str]]) -> str:
    rows = [[name, f"{size:,}", digest] for name, (size, digest) in files.items()]
    heading = "## Files\n\nSHA256SUMS lists this card too: `sha256sum -c SHA256SUMS`.\n\n"
    return heading + str(Table("Files", ["file", "bytes", "sha256"], rows, words=True))
