"""--mode=search: finds images by sentences, and captions or similar images by an image."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from shnet_jax.evaluation.encode import Tower, Towers
from shnet_jax.evaluation.ranking_methods import candidates
from shnet_jax.modes.embed import one_process_mesh, split_embeddings
from shnet_jax.observe.files import write_json
from shnet_jax.observe.table import Table
from shnet_jax.retrieve.approximate import check_index
from shnet_jax.retrieve.searcher import CAPTIONS, Answer, Searcher, encode_texts
from shnet_jax.retrieve.vector_index import PACKAGES, require
from shnet_jax.training.load import Loaded, load

RESULTS = "search.json"
FORMAT = 1  # of RESULTS


def search(
    config: ConfigDict, workdir: str | Path, query: str = "", query_file: str = "", image_id: str = "", top_k: int = 10
) -> None:
    """Prints the best images of config.search.split for sentences, or the best captions and images for an image.

    Writes the same to WORKDIR/search.json.
    """
    workdir = Path(workdir)
    queries = read_queries(query, query_file)
    if not queries and not image_id:
        raise ValueError("--mode=search needs --query, --query_file or --image_id")
    if top_k < 1:
        raise ValueError(f"--top_k is {top_k}; it must be at least 1")
    loaded, tower, searcher = open_search(config, workdir)
    answers = []
    if queries:
        answers += searcher.images_by_text(queries, encode_texts(loaded.experiment, tower, queries), top_k)
    if image_id:
        answers += searcher.by_image([image_id], top_k)
    show(answers, searcher, workdir)


def show(answers: Sequence[Answer], searcher: Searcher, workdir: Path) -> None:
    """Prints answers and the measured recall of an index, and writes them to WORKDIR/search.json."""
    write_json(workdir / RESULTS, document(answers, searcher))
    print(tables(answers), end="")
    for side, index in searcher.indexes.items():
        report = index.report
        print(
            f"{report['kind']} index of {report['vectors']} {side} ({report['settings']}): finds "
            f"{report['recall']:.1%} of the exact first {report['depth']}, measured with {report['queries']} queries"
        )


def open_search(config: ConfigDict, workdir: Path) -> tuple[Loaded, Tower, Searcher]:
    """The run in `workdir`, its text tower on the devices, and the searcher of config.search.split.

    Embeddings that are missing are made. Raises ValueError for an index that does not fit the model, before that.
    """
    mesh, loaded = one_process_mesh(config), load(workdir, config)
    count = candidates(config.eval)
    check_index(config.search.index, loaded.score, count)
    if config.search.index in PACKAGES:
        require(config.search.index)  # before hours of embedding
    embeddings = split_embeddings(loaded, config, workdir, mesh)
    _, tower = Towers(loaded.experiment, mesh, mesh).place(loaded.variables)
    return loaded, tower, Searcher(embeddings, loaded.score, config.eval.tile, mesh, count, config.search)


def read_queries(query: str, query_file: str) -> list[str]:
    """The sentence of --query and those of --query_file, one a line; empty lines are passed over."""
    queries = [query] if query.strip() else []
    if query_file:
        path = Path(query_file)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 and the like are text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected queries in UTF-8: {error}") from None
        queries += [line.strip() for line in lines if line.strip()]
        if not queries:
            raise ValueError(f"{path}: no query, expected one a line")
    return queries


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
        rows = [
            [str(h.rank), f"{h.score:.4f}", h.image_id, textwrap.shorten(h.caption or (h.captions or ("",))[0], 80)]
            for h in answer.hits
        ]
        by = "image " if answer.kind == "image" else ""
        heading = ["", "score", "image", "caption" if answer.target == CAPTIONS else "first caption"]
        title = f"{by}{textwrap.shorten(answer.query, 200)!r} -> {answer.target}"
        texts.append(f"{title}\n{Table(title, heading, rows, words=True)}")
    return "\n".join(texts)
