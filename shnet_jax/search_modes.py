"""What --mode=embed, search and page do, as functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.commands import Loaded, load
from shnet_jax.data.checksums import CHECKSUMS, sha256
from shnet_jax.evaluate.blocks import digest
from shnet_jax.evaluate.split import subject
from shnet_jax.evaluate.two_stage import candidates
from shnet_jax.observe.files import write_json, write_text
from shnet_jax.observe.writer import FILE as METRICS
from shnet_jax.observe.writer import read_metrics
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.retrieve import embed as writing
from shnet_jax.retrieve.backends import PACKAGES, require
from shnet_jax.retrieve.examples import collect
from shnet_jax.retrieve.folder import Embeddings
from shnet_jax.retrieve.indexes import check_index
from shnet_jax.retrieve.page import page as render
from shnet_jax.retrieve.query import Searcher, document, encode_texts, place_towers, read_queries, tables
from shnet_jax.retrieve.scene import Album
from shnet_jax.train.workdir import CONFIG

RESULTS = "search.json"


def provenance(loaded: Loaded, workdir: Path, split: str, devices: int) -> dict[str, Any]:
    """What embeddings come from: data set, split, checkpoint step, hashes of configuration, weights and data set."""
    what = subject(loaded.experiment, split, loaded.step, loaded.selected_on, devices)
    checksums = loaded.experiment.dataset.path / CHECKSUMS  # sets of other tools have none
    return {
        "dataset": what.dataset,
        "dataset_sha256": sha256(checksums) if checksums.is_file() else None,
        "split": split,
        "checkpoint_step": loaded.step,
        "parameters": what.parameters,
        "config_sha256": sha256(workdir / CONFIG),
        "weights_sha256": digest(loaded.variables),
        "dtype": what.dtype,
        "devices": devices,
    }


def embeddings_of(loaded: Loaded, config: ConfigDict, workdir: Path, mesh: Mesh) -> Embeddings:
    """The embeddings of config.search.split in their folder, made there if they are not."""
    split = config.search.split
    name = f"{loaded.experiment.dataset.path.parent.name}_{split}_{loaded.step}"
    folder = Path(config.search.embeddings or workdir / "embeddings" / name)
    source = provenance(loaded, workdir, split, mesh.size)
    return writing.embed(loaded.experiment, loaded.variables, split, mesh, folder, source)


def embed(config: ConfigDict, workdir: str | Path) -> None:
    """Writes the embeddings of config.search.split, images and captions; a killed run goes on with the same command."""
    workdir, mesh = Path(workdir), _mesh(config)
    found = embeddings_of(load(workdir, config), config, workdir, mesh)
    n, t = len(found.ids.image_ids), len(found.ids.captions)
    print(f"{found.folder}: {n} images and {t} captions, {found.images.vector.shape[1]} numbers each")


def search(
    config: ConfigDict, workdir: str | Path, query: str = "", query_file: str = "", image_id: str = "", top_k: int = 10
) -> None:
    """Prints what sentences, or an image, find in config.search.split, and writes it to WORKDIR/search.json."""
    workdir = Path(workdir)
    queries = read_queries(query, query_file)
    if not queries and not image_id:
        raise ValueError("--mode=search needs --query, --query_file or --image_id")
    if top_k < 1:
        raise ValueError(f"--top_k is {top_k}; it must be at least 1")
    mesh, loaded = _mesh(config), load(workdir, config)
    again = candidates(config.eval)
    check_index(config.search.index, loaded.score, again)
    if config.search.index in PACKAGES:
        require(config.search.index)  # before hours of embedding
    embeddings = embeddings_of(loaded, config, workdir, mesh)
    searcher = Searcher(embeddings, loaded.score, config.search, config.eval.tile, mesh, again)
    answers = []
    if queries:
        _, text = place_towers(loaded.experiment, loaded.variables, mesh)
        answers += searcher.images_by_text(queries, encode_texts(loaded.experiment, text, queries), top_k)
    if image_id:
        answers += searcher.by_image([image_id], top_k)
    write_json(workdir / RESULTS, document(answers, searcher))
    print(tables(answers), end="")
    for side, known in searcher.known.items():
        print(
            f"{known['kind']} index of {known['vectors']} {side} ({known['settings']}): finds {known['recall']:.1%} of "
            f"the exact first {known['depth']}, measured with {known['queries']} queries"
        )


def page(config: ConfigDict, workdir: str | Path) -> None:
    """Writes WORKDIR/page_DATASET_SPLIT.html about config.search.split: numbers, curves, examples, highlighting."""
    workdir, mesh = Path(workdir), _mesh(config)
    pictures = Path(config.page.pictures) if config.page.pictures else None
    if pictures is not None and not pictures.is_dir():
        raise ValueError(f"config.page.pictures is {str(pictures)!r}: no such folder")
    loaded = load(workdir, config)
    split, dataset = config.search.split, loaded.experiment.dataset
    embeddings = embeddings_of(loaded, config, workdir, mesh)
    what = subject(loaded.experiment, split, loaded.step, loaded.selected_on, mesh.size)
    contents = collect(loaded.experiment, loaded.variables, embeddings, config, what, mesh)
    if (workdir / METRICS).is_file():
        contents = dataclasses.replace(contents, history=list(read_metrics(workdir / METRICS)))
    album = Album(dataset, split, pictures, dataset.metadata.get("class_names", ()))
    text = render(contents, album)
    path = workdir / f"page_{dataset.path.parent.name}_{split}.html"
    write_text(path, text)
    if pictures is not None and not album.photographs:
        print(
            f"no photograph in {pictures} is named after an image of the page; boxes and label maps are drawn instead"
        )
    print(f"{path} ({len(text) / 1e6:.1f} MB)")


def _mesh(config: ConfigDict) -> Mesh:
    mesh = make_mesh(config.parallel.devices)
    if not hosts.is_first():
        raise ValueError("the modes embed, search and page run in one process")
    return mesh
