"""--mode=page: one HTML file with a model's metrics, its hits, its failures and its highlighting."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax.evaluation.evaluator import provenance
from shnet_jax.modes.embed import one_process_mesh, split_embeddings
from shnet_jax.observe.curves import run_name
from shnet_jax.observe.files import write_text
from shnet_jax.observe.writer import FILE as METRICS
from shnet_jax.observe.writer import read_metrics
from shnet_jax.retrieve.examples import collect, collect_likeness
from shnet_jax.retrieve.page import render_likeness, render_page
from shnet_jax.retrieve.scene import Album, check_pictures, find_pictures
from shnet_jax.training.load import load


def page(config: ConfigDict, workdir: str | Path) -> None:
    """Writes WORKDIR/page_DATASET_SPLIT.html about config.search.split: numbers, curves, examples, highlighting.

    Where images have no caption: images most like each other instead of numbers.
    """
    workdir, mesh = Path(workdir), one_process_mesh(config)
    check_pictures(config.page.pictures)
    loaded = load(workdir, config)
    split, dataset = config.search.split, loaded.experiment.dataset
    pictures = find_pictures(config.page.pictures, dataset)
    embeddings = split_embeddings(loaded, config, workdir, mesh)
    album = Album(dataset, split, pictures, dataset.metadata.get("class_names", ()))
    if dataset.caption_counts(split).min() > 0:
        about = provenance(loaded.experiment, split, loaded.step, loaded.selected_on, mesh.size)
        contents = collect(loaded.experiment, loaded.variables, embeddings, config, about, mesh)
        history = list(read_metrics(workdir / METRICS)) if (workdir / METRICS).is_file() else []
        text = render_page(dataclasses.replace(contents, run=run_name(workdir), history=history), album)
    else:
        likes = collect_likeness(loaded.experiment, loaded.variables, embeddings, loaded.score, config, mesh)
        text = render_likeness(dataclasses.replace(likes, run=run_name(workdir)), album)
    path = workdir / f"page_{dataset.path.parent.name}_{split}.html"
    write_text(path, text)
    if config.page.pictures and not album.photographs:
        print(
            f"no photograph in {pictures} is named after an image of the page; boxes and label maps are drawn instead"
        )
    print(f"{path} ({len(text) / 1e6:.1f} MB)")
