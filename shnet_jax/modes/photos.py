"""`shnet photos`: makes photographs searchable by a pretrained CLIP or SigLIP, by words and by another photograph.

WORKDIR/config.json, checkpoints/   the model's text tower as a run, which search, serve, page and embed take
WORKDIR/encoder.json                the model's folder and the SHA-256 of its files
WORKDIR/data_sets/                  the photographs' vectors, see `data_prep.extract.own_photos`
WORKDIR/head/                       with captions and --head: the run of a head trained on them
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax import bundled
from shnet_jax.data.records import open_dataset
from shnet_jax.evaluation.bootstrap import recall_intervals
from shnet_jax.evaluation.evaluator import Evaluator, evaluate_embedded
from shnet_jax.evaluation.extra_metrics import NO_EXTRA_METRICS
from shnet_jax.evaluation.protocols import Results
from shnet_jax.evaluation.report import interval_table, table, to_json
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.interop import clip_weights, siglip_weights
from shnet_jax.interop.bert_weights import read_config
from shnet_jax.modes.convert import Model, write_run
from shnet_jax.modes.embed import one_process_mesh
from shnet_jax.modes.photo_query import ENCODER, check_encoder, check_files, note_encoder, noted_encoder, open_sight
from shnet_jax.modes.search import open_search, show
from shnet_jax.observe.files import write_text
from shnet_jax.observe.progress import waiting
from shnet_jax.paths import to_path
from shnet_jax.retrieve.searcher import encode_texts
from shnet_jax.training.load import load
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.training.workdir import CONFIG, load_config
from shnet_jax.untrusted import read_picture

log = logging.getLogger(__name__)

DATA_SETS, AGAIN = "data_sets", ".data_sets.again"
"""Folders of the data sets, and of those that are made to replace them."""
HEAD = "head"
ZERO_SHOT = "zero-shot"
RESULTS = "results_captioned"


def photos(
    config: ConfigDict,
    workdir: str | Path,
    folder: str = "",
    model: str = "",
    captions: str = "",
    head: bool = False,
    query: str = "",
    photo: str = "",
    top_k: int = 10,
    device: str = "",
    overwrite: bool = False,
) -> None:
    """Makes the run in `workdir` from a folder of photographs, unless it is there, and answers a query.

    Args:
      config: of configs/dual.py, or, without `overwrite`, of the run that is there.
      workdir: of the run.
      folder: of photographs; "": the run is there.
      model: folder or hub name of a CLIP or SigLIP; "": that of the run, or `encoders.DEFAULT`.
      captions: files of captions for some of the photographs, as the importers take them; "": none.
      head: train a head on the captions and compare it with the model's own vectors on held-out photographs.
      query: words. photo: file of a photograph, which need not be in the folder.
      top_k: results.
      device: of PyTorch, which makes vectors of photographs.
      overwrite: make the run again. What is there stays until the photographs are extracted and all is checked.

    Raises ValueError or OSError with what to change.
    """
    workdir = to_path(workdir)
    _check_flags(workdir, folder, captions, head, photo, overwrite)
    if folder:
        _make(config, workdir, to_path(folder), model, captions, device, overwrite)
        if captions:
            _compare(config, workdir, folder, captions, head)
    if query or photo:
        _answer(config, workdir, query, photo, top_k, device)
    else:
        _say_what_now(config, workdir)


def _check_flags(workdir: Path, folder: str, captions: str, head: bool, photo: str, overwrite: bool) -> None:
    if not folder and not (workdir / CONFIG).is_file():
        raise ValueError(f"{workdir} holds no run yet: shnet photos FOLDER --out={workdir}")
    if overwrite and not folder:
        raise ValueError(f"--overwrite needs the photographs: shnet photos FOLDER --out={workdir} --overwrite")
    if (captions or head) and not folder:
        raise ValueError("--captions and --head need the photographs: shnet photos FOLDER --out=RUN --captions=FILE")
    if head and not captions:
        raise ValueError("--head needs --captions=FILE: a head is trained on captions of your photographs")
    if folder and not to_path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder of photographs")
    if photo and not to_path(photo).is_file():
        raise ValueError(f"--photo={photo}: no such file")


def _make(
    config: ConfigDict, workdir: Path, folder: Path, model: str, captions: str, device: str, overwrite: bool
) -> None:
    """Writes data sets and run unless they are there, and completes `config` for them."""
    from data_prep.extract import encoders, own_photos

    begun = workdir / CONFIG
    _check_run(workdir)
    before = load_config(begun).text.weights if begun.is_file() else ""
    encoder = encoders.folder_of(model or config.text.weights or before or encoders.DEFAULT).resolve()
    if before not in ("", str(encoder)) and not overwrite:
        raise ValueError(f"{workdir} was made with the model {before}, now it is {encoder}; --overwrite makes it again")
    if not overwrite:
        noted = noted_encoder(workdir) if any((workdir / DATA_SETS).glob("*")) else None
        if noted is None:
            note_encoder(workdir, encoder)  # first, as the files of the encoder may be replaced later
        else:
            check_files(workdir, encoder, noted, "put that file back, or make the run again with --overwrite")
    sets = workdir / (AGAIN if overwrite else DATA_SETS)
    trained = workdir / HEAD if any((workdir / HEAD / "checkpoints").glob("*")) else None
    dataset, _ = own_photos.extract(
        folder, encoder, sets, captions, device=device, overwrite=overwrite, trained=trained
    )
    config.text.weights, config.data.dir = str(encoder), str(dataset.resolve())
    config.search.split, config.page.pictures = own_photos.ALL, str(folder.resolve())
    _fit_encoder(config)
    if not overwrite and any((workdir / "checkpoints").glob("*")):
        return  # config.json stays as it is, as embeddings are tied to its content
    experiment = assemble(config)
    with waiting("reading the text tower"):
        variables = init_variables(experiment, config.seed)
    complete = ConfigDict(experiment.config.to_dict())
    if overwrite:  # not earlier: up to here an error leaves the existing run as it was
        _put_in_place(workdir)
        complete.data.dir = config.data.dir = str((workdir / DATA_SETS / dataset.relative_to(sets)).resolve())
        note_encoder(workdir, encoder)  # before write_run: nothing is added to a run that exists
    write_run(workdir, Model(complete, variables, 0))


def _check_run(workdir: Path) -> None:
    """Raises ValueError for a folder with a run of another kind, or with a head: what is trained is not replaced."""
    path = workdir / CONFIG
    if not path.is_file():
        if lying := [name for name in ("checkpoints", "embeddings", HEAD) if any((workdir / name).glob("*"))]:
            raise ValueError(f"{workdir} holds {', '.join(lying)} but no {CONFIG}; choose another --out")
        return
    model = load_config(path).get("model")
    name = model.get("name") if isinstance(model, ConfigDict) else None
    if not isinstance(model, ConfigDict) or name != "dual" or model.get("dual", {}).get("head") != "none":
        contents = "a head that was trained" if name == "dual" else f"a run of the model {name!r}"
        raise ValueError(f"{workdir} holds {contents}, which shnet photos did not make there; choose another --out")


def _put_in_place(workdir: Path) -> None:
    """Removes the run that is there and all that was made with it; the data sets in AGAIN become those of the run."""
    from data_prep.extract import own_photos

    for part in ("checkpoints", "embeddings", HEAD):
        shutil.rmtree(workdir / part, ignore_errors=True)
    for file in (f"{RESULTS}.md", f"{RESULTS}.json", ENCODER):
        (workdir / file).unlink(missing_ok=True)
    (workdir / DATA_SETS).mkdir(exist_ok=True)
    for name in (own_photos.ALL, own_photos.CAPTIONED):
        shutil.rmtree(workdir / DATA_SETS / name, ignore_errors=True)
        if (workdir / AGAIN / name).is_dir():
            (workdir / AGAIN / name).rename(workdir / DATA_SETS / name)
    shutil.rmtree(workdir / AGAIN)


def _fit_encoder(config: ConfigDict) -> None:
    """Chooses the kind of the model in `text.weights`, and cuts captions at its positions: CLIP 77, SigLIP 64."""
    folder = Path(config.text.weights)
    kind = read_config(folder, "CLIP or SigLIP")[1].get("model_type")
    config.text.tower = config.tokenizer.kind = kind
    if kind == "siglip":
        longest = siglip_weights.sizes(folder)["max_positions"]
    else:
        longest = min(config.data.max_tokens, clip_weights.sizes(folder)[0]["max_positions"])
    config.data.max_tokens = longest
    config.data.token_buckets = (*(size for size in config.data.token_buckets if size < longest), longest)


def _compare(config: ConfigDict, workdir: Path, folder: str, captions: str, head: bool) -> None:
    """Prints and writes recalls on the held-out captions: of the model's own vectors and, if wanted, of a head."""
    from data_prep.extract import own_photos

    captioned = workdir / DATA_SETS / own_photos.CAPTIONED
    results = {ZERO_SHOT: _evaluate(config, workdir, captioned)}
    if head:
        results[HEAD] = _evaluate(_train_head(config, workdir, captioned), workdir / HEAD, captioned)
    intervals = {name: one.intervals for name, one in results.items()}
    if head:
        queries = [results[name].queries for name in (HEAD, ZERO_SHOT)]
        assert queries[0] is not None and queries[1] is not None  # `evaluate_embedded` gives them
        intervals[f"{HEAD} - {ZERO_SHOT}"] = recall_intervals([queries[0]], [queries[1]])
    card = results[ZERO_SHOT].card
    about = (
        f"Held out: {card['images']} photographs with {card['captions']} captions, split test. {own_photos.RULE}"
        f"{' The head saw only train; val chose its checkpoint.' if head else ''}"
    )
    text = f"{table(results)}\n{interval_table(intervals)}\n{about}\n"
    write_text(workdir / f"{RESULTS}.md", text)
    write_text(workdir / f"{RESULTS}.json", to_json(results))
    print(text)
    if head:
        every = f"--config.data.dir={config.data.dir} --config.search.split={own_photos.ALL}"
        print(f"To search with the head: shnet search --workdir={workdir / HEAD} {every} --query=...\n")
    else:
        print(
            f"To train a head on these captions: shnet photos {folder} --out={workdir} --captions={captions} --head\n"
        )


def _evaluate(config: ConfigDict, workdir: Path, captioned: Path) -> Results:
    """Results of the run in `workdir` on the test split of the captioned photographs."""
    config = ConfigDict(config.to_dict())
    config.data.dir, config.eval.split, config.eval.protocols = str(captioned), "test", ("whole",)
    mesh, loaded = one_process_mesh(config), load(workdir, config)
    embedded = Evaluator(loaded.experiment, "test", mesh).embed(loaded.variables, loaded.step, loaded.selected_on)
    return evaluate_embedded(embedded, NO_EXTRA_METRICS, config.eval, mesh)["whole"]


def _train_head(config: ConfigDict, workdir: Path, captioned: Path) -> ConfigDict:
    """Trains the head by configs/dual.py:head, or goes on; returns the configuration of its run."""
    c = bundled.get_config("dual:head")
    c.data.dir, c.text.weights = str(captioned.resolve()), config.text.weights
    c.page.pictures, c.parallel.devices, c.seed = config.page.pictures, config.parallel.devices, config.seed
    c.text.frozen_layers = load_config(workdir / CONFIG).text.layers
    _fit_encoder(c)
    counts = open_dataset(captioned).caption_counts(c.data.train_split)
    while c.train.batch_size > max(int(counts.sum()), 1):
        c.train.batch_size //= 2
    note_encoder(workdir / HEAD, Path(c.text.weights))
    train_and_evaluate(c, workdir / HEAD)
    return c


def _answer(config: ConfigDict, workdir: Path, query: str, photo: str, top_k: int, device: str) -> None:
    """Prints the photographs that fit words, and those most like a photograph; writes them to search.json."""
    if top_k < 1:
        raise ValueError(f"--top_k is {top_k}; it must be at least 1")
    loaded, tower, searcher = open_search(config, workdir)
    answers = []
    if query:
        answers += searcher.images_by_text([query], encode_texts(loaded.experiment, tower, [query]), top_k)
    if photo:
        see = open_sight(loaded, config, check_encoder(config, workdir), device)
        answers += searcher.images_like([photo], see([read_picture(to_path(photo))], [photo]), top_k)
    show(answers, searcher, workdir)


def _say_what_now(config: ConfigDict, workdir: Path) -> None:
    sizes: Mapping[str, int] = open_dataset(config.data.dir).splits
    count = sum(sizes.values())
    print(
        f"{count} {'photograph' if count == 1 else 'photographs'} can be searched in {workdir}\n"
        f"  by words:       shnet photos --out={workdir} --query='a dog on a beach'\n"
        f"  by a photo:     shnet photos --out={workdir} --photo=FILE\n"
        f"  in the browser: shnet serve --workdir={workdir}"
    )
