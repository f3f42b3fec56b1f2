"""The project in a few lines of Python: train, evaluate, study, and `load`, which returns a `Retriever`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from shnet_jax import bundled, mirror
from shnet_jax.data.fields import checked_fields
from shnet_jax.data.gallery import Gallery, Part, open_gallery
from shnet_jax.data.records import DataSet, open_dataset
from shnet_jax.evaluation.encode import Towers, encode_parts
from shnet_jax.evaluation.pair_scores import digest
from shnet_jax.evaluation.prefix import check_sizes, prefix
from shnet_jax.evaluation.protocols import Results
from shnet_jax.evaluation.ranking_methods import candidates
from shnet_jax.evaluation.stage_one import make_stage_one
from shnet_jax.evaluation.tiles import tile_size
from shnet_jax.modes.evaluate import evaluate_checkpoint
from shnet_jax.modes.study import Run
from shnet_jax.modes.study import study as run_study
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.paths import to_path
from shnet_jax.retrieve.embeddings import SOURCE, Embeddings, make_ids, open_embeddings
from shnet_jax.retrieve.searcher import Answer, Searcher, encode_texts
from shnet_jax.storage import is_url
from shnet_jax.stored_config import get_config as stored_config
from shnet_jax.training.load import Loaded
from shnet_jax.training.load import load as load_trained
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.types import Embedding

__all__ = ["Retriever", "evaluate", "get_config", "load", "open_dataset", "study", "train"]


def get_config(name: str) -> ConfigDict:
    """The configuration of a bundled name ("demo", "shnet:region,f30k") or of a file, as the flag `--config` takes it.

    Raises ValueError that names near ones when there is none.
    """
    return bundled.get_config(name)


def train(config: ConfigDict | str, workdir: str | Path) -> Results:
    """Trains in `workdir`, or continues there; returns the last validation result, whose `.metrics` has the numbers.

    config: a configuration, or what `get_config` takes.
    Raises what `train.loop.train_and_evaluate` raises.
    """
    with mirror.working_in(workdir, alone=True) as folder:
        return train_and_evaluate(get_config(config) if isinstance(config, str) else config, folder)


def evaluate(workdir: str | Path, config: ConfigDict | None = None, split: str = "") -> Results:
    """Evaluates a checkpoint of a run; `.metrics` of the result has the numbers, `.card` the protocol.

    Args:
      workdir: the work folder of the run.
      config: its sections data, eval and parallel say how; None: the configuration of the run.
      split: split of the data set; "": config.eval.split.

    Raises:
      ValueError, WorkdirError, CheckpointError: there is no such run, or it does not fit the data set.
    """
    with mirror.working_in(workdir) as folder:
        config = ConfigDict((stored_config(str(folder)) if config is None else config).to_dict())
        config.eval.split = split or config.eval.split
        return evaluate_checkpoint(config, folder)


def study(config: ConfigDict | str, workdir: str | Path) -> dict[str, list[Run]]:
    """Trains and compares config.study.arms below `workdir`; returns the runs of each arm, `.results` of each."""
    with mirror.working_in(workdir, alone=True) as folder:
        return run_study(get_config(config) if isinstance(config, str) else config, folder)


def load(path: str | Path, data_dir: str | Path = "", config: ConfigDict | None = None) -> Retriever:
    """Loads the best checkpoint of a run, or a certain one.

    Args:
      path: the work folder of a run, or the folder of one of its checkpoints (WORKDIR/checkpoints/STEP).
      data_dir: data set that images come from; "": that of the run.
      config: of the same model, for another choice in its sections eval, parallel and search; None: that of the run,
        which may then name modules outside shnet_jax only if these are imported already: it may be somebody else's.

    Raises:
      FileNotFoundError, ValueError, WorkdirError, CheckpointError: there is nothing to load, or it does not fit.
    """
    if is_url(path):
        run, _, number = str(path).rstrip("/").rpartition("/checkpoints/")
        path = mirror.local(run) / "checkpoints" / number if run and number.isdecimal() else mirror.local(str(path))
    path = to_path(path)
    workdir, step = path, None
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        workdir, step = path.parent.parent, int(path.name)
    config = ConfigDict((stored_config(str(workdir)) if config is None else config).to_dict())
    config.data.dir = str(data_dir) or config.data.dir
    return Retriever(load_trained(workdir, config, step), config)


class Retriever:
    """A trained model with its data set: encodes images and sentences, searches one with the other."""

    def __init__(self, loaded: Loaded, config: ConfigDict):
        self.loaded, self.config = loaded, config
        self._mesh, self._candidates = make_mesh(config.parallel.devices), candidates(config.eval)
        self._galleries: dict[str, Embeddings] = {}
        self._searchers: dict[str, Searcher] = {}

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Retriever({config.name!r}: model {config.model.name}, step {self.loaded.step}, on "
            f"{self.dataset.path.parent.name})"
        )

    @property
    def dataset(self) -> DataSet:
        """The data set that images come from."""
        return self.loaded.experiment.dataset

    @cached_property
    def _towers(self) -> Any:
        return Towers(self.loaded.experiment, self._mesh, self._mesh).place(self.loaded.variables)

    def encode_texts(self, texts: str | Sequence[str]) -> Embedding:
        """Encodes one or more sentences: t embeddings in NumPy, `.vector` [t, d] float32, of unit length.

        Of a run on stored vectors they go through the model that made these, where it is here.
        """
        return encode_texts(self.loaded.experiment, self._towers[1], [texts] if isinstance(texts, str) else texts)

    def encode_images(self, images: str | Mapping[str, np.ndarray]) -> Embedding:
        """Encodes images: n embeddings in NumPy, `.vector` [n, d] float32, of unit length.

        images: a split of the data set; or the record fields that the model reads ({"regions": [n, K, D], ...}, see
          docs/data.md), with the masks of padded units.
        Raises ValueError for fields that are missing, differ in their number of images or are not as in the data set.
        """
        rows = self.config.eval.batch_size * self._mesh.size
        if isinstance(images, str):
            gallery = self._gallery(images)
            return encode_parts(self._towers[0], gallery.image_batches(rows), gallery.images)
        fields = checked_fields(images, self.loaded.experiment.fields, self.dataset)
        count = len(next(iter(fields.values())))
        return encode_parts(self._towers[0], _parts(fields, count, rows), count)

    def search(self, query: str | Sequence[str], split: str = "test", top_k: int = 10) -> list[Answer]:
        """Finds the `top_k` images of a split that fit each sentence best: an Answer with `.hits` for each sentence.

        The split is encoded at the first search and kept; `open` takes its vectors from a folder instead.
        """
        queries = [query] if isinstance(query, str) else list(query)
        return self._searcher(split).images_by_text(queries, self.encode_texts(queries), top_k)

    def search_by_image(self, image_id: str | Sequence[str], split: str = "test", top_k: int = 10) -> list[Answer]:
        """Finds the captions that fit images of a split best, and the images most like them."""
        return self._searcher(split).by_image([image_id] if isinstance(image_id, str) else list(image_id), top_k)

    def open(self, folder: str | Path) -> None:
        """Takes the embeddings of a split from a folder of --mode=embed.

        Raises ValueError for embeddings of another checkpoint, of another run or of another step.
        """
        embeddings = open_embeddings(folder)
        ours = {"checkpoint_step": self.loaded.step, "weights_sha256": digest(self.loaded.variables)}
        for name, value in ours.items():
            if (stored := embeddings.source.get(name)) != value:
                raise ValueError(
                    f"{folder} holds embeddings of another checkpoint: {name} is {stored!r} in its {SOURCE}, "
                    f"{value!r} of this model; make them with --mode=embed on its run"
                )
        if (stored := embeddings.source.get("dims", 0)) != (asked := self.config.search.dims):
            raise ValueError(
                f"{folder} holds vectors of config.search.dims {stored}, and {asked} is asked for; set it to {stored}, "
                "or make others with --mode=embed"
            )
        split = embeddings.source["split"]
        self._galleries[split] = embeddings
        self._searchers.pop(split, None)

    def _gallery(self, split: str) -> Gallery:
        experiment = self.loaded.experiment
        return open_gallery(
            *(experiment.config, experiment.dataset, split, experiment.tokenizer),
            *(experiment.fields, experiment.text_fields),
        )

    def _searcher(self, split: str) -> Searcher:
        if split in self._searchers:
            return self._searchers[split]
        if split not in self._galleries:
            ids = make_ids(self.dataset, split)
            images = self.encode_images(split)
            if not ids.captions:
                texts = jax.tree.map(lambda array: array[:0], images)
            elif self.loaded.experiment.text_fields:
                rows, gallery = self.config.eval.batch_size * self._mesh.size, self._gallery(split)
                texts = encode_parts(self._towers[1], gallery.text_batches(rows), len(gallery.captions))
            else:
                texts = self.encode_texts(ids.captions)
            if dims := self.config.search.dims:
                check_sizes(self.loaded.experiment, (dims,), "search.dims")
                images, texts = prefix(images, dims), prefix(texts, dims)
            self._galleries[split] = Embeddings(Path(), {"split": split}, ids, images, texts)
        score, seed = self.loaded.score, self.loaded.experiment.config.seed
        first = make_stage_one(self.config.eval, score, seed, self._mesh)
        options = tile_size(self.config.eval, self._mesh), self._mesh, self._candidates
        stored = self._galleries[split].folder != Path()  # an index lies beside embeddings on disk
        search = self.config.search if stored else None
        self._searchers[split] = Searcher(self._galleries[split], score, *options, search, first)
        return self._searchers[split]


def _parts(fields: Mapping[str, np.ndarray], count: int, rows: int) -> Any:
    """Splits items into batches of full size; the last one repeats its first row."""
    for start in range(0, count, rows):
        numbers = np.arange(start, min(start + rows, count))
        padded = np.pad(numbers, (0, rows - len(numbers)), constant_values=start)
        batch = {name: values[padded] for name, values in fields.items()}
        yield Part({"image_index": padded.astype(np.int32), **batch}, len(numbers), numbers)
