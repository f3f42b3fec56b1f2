"""--mode=search: finds images by sentences, and captions or similar images by an image."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from shnet_jax.evaluation.encode import Tower, Towers
from shnet_jax.evaluation.ranking_methods import candidates
from shnet_jax.evaluation.stage_one import make_stage_one
from shnet_jax.evaluation.tiles import tile_size
from shnet_jax.modes import photo_query
from shnet_jax.modes.embed import one_process_mesh, split_embeddings
from shnet_jax.observe.files import write_json
from shnet_jax.observe.table import Table
from shnet_jax.retrieve.approximate import check_index, check_options
from shnet_jax.retrieve.searcher import CAPTIONS, Answer, Searcher, encode_texts, encode_vectors
from shnet_jax.retrieve.vector_index import PACKAGES, require
from shnet_jax.training.load import Loaded, load
from shnet_jax.untrusted import open_npy, read_picture

RESULTS = "search.json"
FORMAT = 1  # of RESULTS


def search(
    config: ConfigDict,
    workdir: str | Path,
    query: str = "",
    query_file: str = "",
    image_id: str = "",
    top_k: int = 10,
    query_vectors: str = "",
    photo: str = "",
    device: str = "",
) -> None:
    """Prints the best images of config.search.split for sentences, or the best captions and images for an image.

    Writes the same to WORKDIR/search.json. query_vectors: .npy of the vectors of the queries, in any language that
    their model speaks, for a run whose text side is stored vectors; query and query_file then only name them.
    photo: file of a photograph that is no part of the split, for a run of `shnet photos`. device: of PyTorch, which
    makes its vector.
    """
    workdir = Path(workdir)
    queries = read_queries(query, query_file)
    vectors = read_vectors(query_vectors) if query_vectors else None
    if vectors is not None:
        queries = queries or [f"{Path(query_vectors).name} row {row}" for row in range(len(vectors))]
        if len(queries) != len(vectors):
            raise ValueError(
                f"{query_vectors}: expected a row for each of {len(queries)} queries, found {len(vectors)}"
            )
    if not queries and not image_id and not photo:
        raise ValueError("--mode=search needs --query, --query_file, --query_vectors, --image_id or --photo")
    if top_k < 1:
        raise ValueError(f"--top_k is {top_k}; it must be at least 1")
    encoder = photo_query.check_encoder(config, workdir) if photo else None
    picture = _photograph(photo) if photo else None
    loaded, tower, searcher = open_search(config, workdir)
    answers = []
    if vectors is not None:
        if not (of_texts := loaded.experiment.text_fields):
            raise ValueError("--query_vectors is for runs of config.text.tower=vectors; this one reads words: --query")
        given = encode_vectors(loaded.experiment, tower, {of_texts[0]: vectors})
        answers += searcher.images_by_text(queries, given, top_k)
    elif queries:
        answers += searcher.images_by_text(queries, encode_texts(loaded.experiment, tower, queries), top_k)
    if image_id:
        answers += searcher.by_image([image_id], top_k)
    if encoder is not None and picture is not None:
        see = photo_query.open_sight(loaded, config, encoder, device)
        answers += searcher.images_like([photo], see([picture], [photo]), top_k)
    show(answers, searcher, workdir)


def _photograph(photo: str) -> Image.Image:
    """The photograph of --photo. Raises ValueError or FileNotFoundError."""
    if not Path(photo).is_file():
        raise FileNotFoundError(f"--photo={photo}: no such file")
    return read_picture(Path(photo))


def show(answers: Sequence[Answer], searcher: Searcher, workdir: Path) -> None:
    """Prints answers and the measured recall of an index, and writes them to WORKDIR/search.json."""
    write_json(workdir / RESULTS, document(answers, searcher))
    print(tables(answers), end="")
    for side, index in searcher.indexes.items():
        report = index.report
        settings = f" ({report['settings']})" if report["settings"] else ""
        size = f"{report['bytes_per_vector']:.0f} bytes a vector, " if report["bytes_per_vector"] else ""
        print(
            f"{report['kind']} index of {report['vectors']} {side}{settings}: finds {report['recall']:.1%} of the "
            f"exact first {report['depth']}, measured with {report['queries']} queries; "
            f"{size}{report['vector_bytes']} as float32"
        )


def open_search(config: ConfigDict, workdir: Path) -> tuple[Loaded, Tower, Searcher]:
    """The run in `workdir`, its text tower on the devices, and the searcher of config.search.split.

    Embeddings that are missing are made. Raises ValueError for an index that does not fit the model, before that.
    """
    mesh, loaded = one_process_mesh(config), load(workdir, config)
    count = candidates(config.eval)
    check_index(config.search.index, loaded.score, count)
    check_options(config.search)
    if config.search.index in PACKAGES:
        require(config.search.index)  # before hours of embedding
    first = make_stage_one(config.eval, loaded.score, loaded.experiment.config.seed, mesh)
    embeddings = split_embeddings(loaded, config, workdir, mesh)
    _, tower = Towers(loaded.experiment, mesh, mesh).place(loaded.variables)
    tile = tile_size(config.eval, mesh)
    return loaded, tower, Searcher(embeddings, loaded.score, tile, mesh, count, config.search, first)


def read_queries(query: str, query_file: str) -> list[str]:
    """The sentence of --query and those of --query_file, one a line; empty lines are passed over."""
    queries = [query] if query.strip() else []
    if query_file:
        path = Path(query_file)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 and similar separators are text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected queries in UTF-8: {error}") from None
        queries += [line.strip() for line in lines if line.strip()]
        if not queries:
            raise ValueError(f"{path}: no query, expected one a line")
    return queries


def read_vectors(path: str | Path) -> np.ndarray:
    """Rows of an .npy file of numbers, [q, ...]. Raises ValueError for another file."""
    return np.array(open_npy(Path(path)))


def document(answers: Sequence[Answer], searcher: Searcher) -> dict[str, Any]:
    """The results as JSON values: {"format", "gallery", "index", "results": [{"query", "kind", "target", "hits"}]}."""
    results = []
    for answer in answers:
        hits = [
            {name: value for name, value in dataclasses.asdict(hit).items() if value not in (None, ())}
            for hit in answer.hits
        ]
        results.append({"query": answer.query, "kind": answer.kind, "target": answer.target, "hits": hits})
    return {"format": FORMAT, "gallery": searcher.embeddings.source, "index": searcher.about, "results": results}


def tables(answers: Sequence[Answer]) -> str:
    """The results for people: a Markdown table for each query."""
    texts = []
    for answer in answers:
        captions = [textwrap.shorten(h.caption or (h.captions or ("",))[0], 80) for h in answer.hits]
        shown = [captions] if any(captions) else []  # a gallery may have none
        rows = [
            [str(h.rank), f"{h.score:.4f}", h.image_id, *of_hit] for h, *of_hit in zip(answer.hits, *shown, strict=True)
        ]
        by = "image " if answer.kind == "image" else ""
        heading = ["", "score", "image", *["caption" if answer.target == CAPTIONS else "first caption" for _ in shown]]
        title = f"{by}{textwrap.shorten(answer.query, 200)!r} -> {answer.target}"
        texts.append(f"{title}\n{Table(title, heading, rows, words=True)}")
    return "\n".join(texts)
