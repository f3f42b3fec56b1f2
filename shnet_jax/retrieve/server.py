"""Search of one run in the browser, and as JSON: the Starlette application of `shnet serve`.

GET  /                  search page; ?q=WORDS shows the images that fit best
GET  /image/ID          an image: its captions, the captions that it finds, images like it, what the model looks at
GET  /search?q=&k=      {"query", "kind", "target", "hits"}
GET  /search?image=&k=  {"results": [captions, images]}
POST /search            {"queries": [...], "k": 10} -> {"results": [...]}
POST /photo?k=          a picture file -> {"query", "kind", "target", "hits"}; from the form of the page: a page
GET  /health            {"status", "images", "captions", "index"}

A bad request gets status 4xx and {"error": one line}. Requests that wait are answered together, in one batch of the
text tower.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from shnet_jax.evaluation.encode import Tower
from shnet_jax.experiment import Experiment
from shnet_jax.observe import html
from shnet_jax.observe.html import Child, Markup, tag
from shnet_jax.retrieve.form import file_in
from shnet_jax.retrieve.highlight import highlights
from shnet_jax.retrieve.highlight_view import panels
from shnet_jax.retrieve.scene import Album
from shnet_jax.retrieve.searcher import CAPTIONS, Answer, Searcher, encode_texts
from shnet_jax.types import Embedding
from shnet_jax.untrusted import parse_json, parse_picture

MAX_RESULTS = 100
MAX_QUERIES = 64  # of a request, and of a batch
MAX_LETTERS = 2000  # of a query
MAX_BODY = 2**20
MAX_PHOTO = 2**24
MAX_READ = 2 * MAX_PHOTO  # more is read than accepted, as a client that is still sending may not read the error
MAX_UPLOADS = 4  # photographs that are in memory at once, from their first byte to their answer; others wait unread
READ_SECONDS = 60.0  # for the body of a request, so that a slow client does not keep others waiting for good
SHOWN = 20  # results on the page

STYLE = """
form{display:flex;gap:8px;margin:14px 0 6px}
form input{flex:1;min-width:0;font:inherit;padding:9px 12px;border:1px solid var(--line);border-radius:8px;
background:var(--card);color:var(--ink)}
form button{font:inherit;padding:9px 16px;border:0;border-radius:8px;background:var(--link);color:var(--bg)}
form input[type=file]{padding:9px 12px;font-size:.8125rem}
.side h2{margin-top:0}
.card a{color:inherit;text-decoration:none;display:block}
.card a:focus-visible,.card a:hover{outline:3px solid var(--link);outline-offset:-3px}
"""


@dataclasses.dataclass(frozen=True)
class Engine:
    """The parts that answer queries: a trained model, its text tower on the devices, and the searcher of a split.

    pictures: folder of photographs, see config.page.pictures; None: label maps and boxes are shown.
    sight: encoder of new photographs; None: only images of the split are searched by.
    """

    experiment: Experiment
    variables: dict[str, Any]
    tower: Tower
    searcher: Searcher
    pictures: Path | None = None
    sight: Callable[[Sequence[Image.Image], Sequence[str]], Embedding] | None = None

    @property
    def images(self) -> int:
        """Number of images that are searched."""
        return len(self.searcher.embeddings.ids.image_ids)

    def by_words(self, queries: Sequence[str]) -> list[Answer]:
        """The best images for each query, up to MAX_RESULTS. Raises ValueError for a query without words."""
        texts = encode_texts(self.experiment, self.tower, queries)
        return self.searcher.images_by_text(queries, texts, min(MAX_RESULTS, self.images))

    def by_image(self, image_id: str) -> list[Answer]:
        """The best captions of an image, and images like it. Raises ValueError for an id that is not there."""
        return self.searcher.by_image([image_id], min(MAX_RESULTS, self.images))

    def by_photo(self, picture: Image.Image, name: str) -> Answer:
        """The images most like a photograph that is no part of the split. Needs `sight`."""
        assert self.sight is not None
        images = self.sight([picture], [name])
        return self.searcher.images_like([name], images, min(MAX_RESULTS, self.images))[0]

    def album(self) -> Album:
        """A new album of the split's pictures, still empty."""
        dataset = self.experiment.dataset
        split = self.searcher.embeddings.source["split"]
        return Album(dataset, split, self.pictures, dataset.metadata.get("class_names", ()))


class Batches:
    """Answers queries that wait at the same time in one batch; use it inside `async with running()`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: asyncio.Queue[tuple[Sequence[str], asyncio.Future[list[Answer]]]] = asyncio.Queue()
        self.device = asyncio.Lock()  # the devices run one program at a time

    async def answer(self, queries: Sequence[str]) -> list[Answer]:
        """The answers to the queries of one request. Raises what `Engine.by_words` raises."""
        future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        await self._waiting.put((queries, future))
        return await future

    async def by_image(self, image_id: str) -> list[Answer]:
        """The answers of `Engine.by_image`."""
        async with self.device:
            return await run_in_threadpool(self._engine.by_image, image_id)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answers in the background."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()

    async def _run(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and sum(len(queries) for queries, _ in batch) < MAX_QUERIES:
                batch.append(self._waiting.get_nowait())
            async with self.device:
                await self._answer(batch)

    async def _answer(self, batch: Sequence[tuple[Sequence[str], asyncio.Future[list[Answer]]]]) -> None:
        try:
            together = [query for queries, _ in batch for query in queries]
            answers = iter(await run_in_threadpool(self._engine.by_words, together))
        except Exception as error:
            if len(batch) > 1:  # one invalid query must not fail the others: answer each request alone
                for request in batch:
                    await self._answer([request])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for queries, future in batch:
            of_request = [next(answers) for _ in queries]
            if not future.done():  # its client may have left
                future.set_result(of_request)


def application(engine: Engine) -> Starlette:
    """The web application of an engine; call `warm_up` first, so that no request waits for a compiler."""
    batches = Batches(engine)
    uploads = asyncio.Semaphore(MAX_UPLOADS)

    async def health(request: Request) -> Response:
        about = engine.searcher
        count = len(about.embeddings.ids.captions)
        return JSONResponse({"status": "ok", "images": engine.images, "captions": count, "index": about.about["kind"]})

    async def search(request: Request) -> Response:
        if request.method == "POST":
            queries, count = await _batch_of(request)
            answers = await batches.answer(queries)
            return JSONResponse({"results": [_document(answer, count) for answer in answers]})
        count = _count(request.query_params.get("k", "10"))
        if "image" in request.query_params:
            answers = await batches.by_image(_known(engine, request.query_params["image"]))
            return JSONResponse({"results": [_document(answer, count) for answer in answers]})
        query = _query(request.query_params.get("q", ""), "q")
        return JSONResponse(_document((await batches.answer([query]))[0], count))

    async def home(request: Request) -> Response:
        words = request.query_params.get("q", "")
        answer = (await batches.answer([_query(words, "q")]))[0] if words.strip() else None
        return HTMLResponse(await run_in_threadpool(_search_page, engine, words, answer))

    async def image(request: Request) -> Response:
        name = _known(engine, request.path_params["name"])
        answers = await batches.by_image(name)
        async with batches.device:
            return HTMLResponse(await run_in_threadpool(_image_page, engine, name, answers))

    async def photo(request: Request) -> Response:
        return await _answer_photo(request, engine, uploads, batches.device)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with batches.running():
            yield

    routes = [
        Route("/", home),
        Route("/image/{name:path}", image),
        Route("/search", search, methods=["GET", "POST"]),
        Route("/photo", photo, methods=["POST"]),
        Route("/health", health),
    ]
    faults: dict[Any, Any] = {HTTPException: _refused, ValueError: _invalid}
    return Starlette(routes=routes, exception_handlers=faults, lifespan=lifespan)


async def _answer_photo(request: Request, engine: Engine, uploads: asyncio.Semaphore, device: asyncio.Lock) -> Response:
    """The answer to a request with a photograph: a page where the form of the page sent it, JSON otherwise.

    uploads: limits the photographs in memory. device: held while the devices work. Raises HTTPException or ValueError.
    """
    if engine.sight is None:
        raise HTTPException(404, "photo: this server has no encoder of photographs, see its first lines")
    count, kind = _count(request.query_params.get("k", "10")), request.headers.get("content-type", "")
    name, of_form = "photo", kind.lower().startswith("multipart/")
    async with uploads:
        data = await _body(request, MAX_PHOTO)
        if of_form:
            data, name = await run_in_threadpool(file_in, kind, data, "photo")
        async with device:  # one at a time: a picture may take 200 MB
            picture = await run_in_threadpool(parse_picture, data, name)
            answer = await run_in_threadpool(engine.by_photo, picture, name)
            if of_form:
                return HTMLResponse(await run_in_threadpool(_search_page, engine, "", answer, picture))
    return JSONResponse(_document(answer, count))


def warm_up(engine: Engine) -> None:
    """Compiles the programs of a few batch sizes, so that no request waits for a compiler."""
    for count in (1, 2, 4, 8, 16):
        engine.by_words(["a"] * count)
    engine.by_image(engine.searcher.embeddings.ids.image_ids[0])
    if engine.sight is not None:
        engine.by_photo(Image.new("RGB", (32, 32)), "")


async def _refused(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": str(error.detail)}, error.status_code)


async def _invalid(request: Request, error: ValueError) -> Response:
    return JSONResponse({"error": " ".join(str(error).split())}, 400)


def _query(text: object, name: str) -> str:
    """A query of a request. Raises ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: expected words, found {text!r:.80}")
    if len(text) > MAX_LETTERS:
        raise ValueError(f"{name}: expected at most {MAX_LETTERS} letters, found {len(text)}")
    return text


def _count(value: object) -> int:
    """The number of results that a request asks for. Raises ValueError."""
    try:
        count = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else 0
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_RESULTS:
        raise ValueError(f"k: expected a whole number from 1 to {MAX_RESULTS}, found {value!r:.80}")
    return count


async def _body(request: Request, most: int) -> bytes:
    """The body of a request. Raises HTTPException for more than `most` bytes, or a timeout."""
    body, received = bytearray(), 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for part in request.stream():
                received += len(part)
                if received > MAX_READ:
                    break
                if received <= most:
                    body += part
    except TimeoutError:
        raise HTTPException(408, f"expected the whole body within {READ_SECONDS:g} seconds") from None
    except ClientDisconnect:  # the client has left: no one reads this response
        raise HTTPException(400, "expected the whole body, found a part") from None
    if received > most:
        raise HTTPException(413, f"expected at most {most} bytes")
    return bytes(body)


async def _batch_of(request: Request) -> tuple[list[str], int]:
    """The queries and the number of results of a POST request. Raises ValueError or HTTPException."""
    document = parse_json(await _body(request, MAX_BODY), "the body of the request")
    queries = document.get("queries") if isinstance(document, dict) else None
    if not isinstance(queries, list) or not 1 <= len(queries) <= MAX_QUERIES:
        raise ValueError(f'expected {{"queries": [1 to {MAX_QUERIES} texts], "k": 10}}, found {document!r:.80}')
    return [_query(query, f"queries[{i}]") for i, query in enumerate(queries)], _count(document.get("k", 10))


def _known(engine: Engine, name: str) -> str:
    if name not in engine.searcher.embeddings.ids.rows:
        raise HTTPException(404, f"image: no image {name!r:.80} among {engine.images}")
    return name


def _document(answer: Answer, count: int) -> dict[str, Any]:
    hits = [
        {name: value for name, value in dataclasses.asdict(hit).items() if value not in (None, ())}
        for hit in answer.hits[:count]
    ]
    return {"query": answer.query, "kind": answer.kind, "target": answer.target, "hits": hits}


def _page(engine: Engine, title: str, words: str, album: Album, *body: Child) -> str:
    source = engine.searcher.embeddings.source
    form = tag(
        "form",
        tag("input", name="q", value=words, placeholder="words", aria_label="Search", autofocus=not words),
        tag("button", "Search"),
        action="/",
        role="search",
    )
    upload = tag(
        "form",
        tag("input", type="file", name="photo", accept="image/*", required=True, aria_label="Photograph"),
        tag("button", "Search", aria_label="Search images like this photograph"),
        action="/photo",
        method="post",
        enctype="multipart/form-data",
    )
    searched = dict.fromkeys((source.get("dataset", ""), source["split"]))  # `shnet photos` calls both the same
    name = f"{engine.experiment.config.name}: {' '.join(searched)}"
    heading = tag("h1", tag("a", name, href="/", style="color:inherit;text-decoration:none"))
    return html.document(
        f"{title} - {name}" if title else name,
        heading,
        form,
        upload if engine.sight else None,
        *body,
        style=album.style() + STYLE,
    )


def _card(album: Album, engine: Engine, image_id: str, head: str, text: str) -> Markup:
    scene = album.scene(engine.searcher.embeddings.ids.rows[image_id])
    words = tag("div", tag("div", tag("span", head), class_="head"), tag("bdi", text), class_="text")
    return tag("div", tag("a", scene.picture(), words, href=f"/image/{quote(image_id, safe='')}"), class_="card")


def _search_page(engine: Engine, words: str, answer: Answer | None, photo: Image.Image | None = None) -> str:
    """The page of an answer to words or to a photograph; without an answer, the start page."""
    album = engine.album()
    if answer is None:
        about = f"{engine.images} images. Words find images; a click on one shows its captions and images like it."
        return _page(engine, "", "", album, tag("p", about, class_="muted"))
    cards = [
        _card(album, engine, hit.image_id, f"{hit.rank}.  {hit.score:.3f}", next(iter(hit.captions), hit.image_id))
        for hit in answer.hits[:SHOWN]
    ]
    if photo is None:
        return _page(engine, words, words, album, tag("div", cards, class_="cards"))
    scene = album.given(answer.query, photo)
    given = tag("div", scene.card(0), tag("h2", "Images like ", tag("bdi", answer.query)), class_="side")
    return _page(engine, answer.query, "", album, given, tag("div", cards, class_="cards"))


def _image_page(engine: Engine, name: str, answers: Sequence[Answer]) -> str:
    album, ids = engine.album(), engine.searcher.embeddings.ids
    row = ids.rows[name]
    scene, captions = album.scene(row), ids.captions_of(row)
    written = tag("div", tag("h2", tag("bdi", name)), [tag("p", tag("bdi", caption)) for caption in captions])
    body: list[Child] = [tag("div", scene.card(6), written, class_="side")]
    for answer in answers:
        hits = answer.hits[:SHOWN]
        if answer.target == CAPTIONS:
            lines = [_line(hit.caption or "", f"{hit.score:.3f}", hit.image_id == name) for hit in hits]
            body += [tag("h2", "Captions that fit it best"), tag("ol", lines)]
        else:
            cards = [
                _card(
                    album, engine, hit.image_id, f"{hit.rank}.  {hit.score:.3f}", next(iter(hit.captions), hit.image_id)
                )
                for hit in hits
            ]
            body += [tag("h2", "Images like it"), tag("div", cards, class_="cards")]
    look = highlights(engine.experiment, engine.variables, engine.searcher.embeddings.source["split"], [row])[0]
    if shown := panels(scene, look, captions):
        body += [tag("h2", "What the model looks at"), shown]
    return _page(engine, name, "", album, *body)


def _line(caption: str, score: str, right: bool) -> Markup:
    mark = tag("span", "✓" if right else "", class_="mark")
    words = tag("span", tag("bdi", caption))
    return tag("li", mark, tag("span", score, class_="num"), words, class_="good" if right else None)
