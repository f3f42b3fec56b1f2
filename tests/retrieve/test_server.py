"""The search page and its JSON interface, over real connections."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import json
import re
import signal
import subprocess
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import pytest

from shnet_jax.modes.search import open_search
from shnet_jax.modes.serve import serve
from shnet_jax.retrieve import server
from tests.browser import BROWSER, HOSTILE, needs_browser
from tests.load import get, get_json, under_load
from tests.patience import PATIENCE
from tests.processes import Program
from tests.retrieve import gallery
from tests.retrieve.serving import serving
from tests.train import tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def engine():
    loaded, tower, searcher = open_search(gallery.toy(), gallery.toy_run())
    return server.Engine(loaded.experiment, loaded.variables, tower, searcher)


@pytest.fixture(scope="module")
def address(engine):
    """Address of a running server."""
    with serving(engine) as running:
        yield running


def test_health(address, engine):
    assert get_json(f"{address}/health") == (
        200,
        {"status": "ok", "images": 10, "captions": 50, "index": "exact"},
    )


def test_the_same_results_as_the_searcher(address, engine):
    queries = ["a red star", "two squares above the sea", "a red star"]
    expected = [[(hit.image_id, hit.captions) for hit in answer.hits[:3]] for answer in engine.by_words(queries)]
    status, document = get_json(f"{address}/search", json.dumps({"queries": queries, "k": 3}).encode())
    assert status == 200
    shown = [[(hit["image_id"], tuple(hit["captions"])) for hit in r["hits"]] for r in document["results"]]
    assert shown == expected and [result["query"] for result in document["results"]] == queries
    status, one = get_json(f"{address}/search", q=queries[1], k=3)
    assert (one["kind"], one["target"]) == ("text", "images")
    assert [hit["image_id"] for hit in one["hits"]] == [image_id for image_id, _ in expected[1]]
    name = expected[0][0][0]
    status, both = get_json(f"{address}/search", image=name, k=2)
    assert [result["target"] for result in both["results"]] == ["captions", "images"]
    assert all(len(result["hits"]) == 2 for result in both["results"])
    assert name not in [hit["image_id"] for hit in both["results"][1]["hits"]]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("search", None, 400, "q: expected words, found ''"),
        ("search?q=%20", None, 400, "q: expected words"),
        ("search?q=dog&k=0", None, 400, "k: expected a whole number from 1 to 100, found '0'"),
        ("search?q=dog&k=1e9", None, 400, "k: expected a whole number from 1 to 100, found '1e9'"),
        ("search?q=" + "a" * 2001, None, 400, "q: expected at most 2000 letters, found 2001"),
        ("search?image=none", None, 404, "image: no image 'none' among 10"),
        ("image/none", None, 404, "image: no image 'none' among 10"),
        ("image/..%2F..%2Fetc%2Fpasswd", None, 404, "no image '../../etc/passwd'"),
        ("nowhere", None, 404, "Not Found"),
        ("health", b"", 405, "Method Not Allowed"),
        ("photo", None, 405, "Method Not Allowed"),
        ("photo", b"a picture", 404, "photo: this server has no encoder of photographs"),
        ("search", b"", 400, "the body of the request"),
        ("search", b"{", 400, "the body of the request"),
        ("search", b"[1]", 400, 'expected {"queries": [1 to 64 texts], "k": 10}, found [1]'),
        ("search", b'{"queries": []}', 400, 'expected {"queries": [1 to 64 texts]'),
        ("search", b'{"queries": ["dog", 3]}', 400, "queries[1]: expected words, found 3"),
        ("search", b'{"queries": ["dog"], "k": true}', 400, "k: expected a whole number from 1 to 100, found True"),
        ("search", b'{"queries": ["\\ud800"]}', 400, "expected text in UTF-8"),
        ("search", b" " * (server.MAX_BODY + 1), 413, "expected at most 1048576 bytes"),
    ],
)
def test_a_bad_request_gets_one_line(path, body, status, message, address):
    found, document = get_json(f"{address}/{path}", body)
    assert found == status and message in document["error"] and "\n" not in document["error"]
    assert get_json(f"{address}/health")[0] == 200


def test_a_bad_query_spoils_no_other_one(address):
    """Requests that wait together are encoded together."""
    good = {"queries": ["a red star"], "k": 1}
    bad = {"queries": ["\ud800"], "k": 1}
    bodies = [json.dumps(bad if i % 4 == 3 else good).encode() for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(lambda body: get(f"{address}/search", body)[0], bodies))
    assert statuses == [400 if i % 4 == 3 else 200 for i in range(24)]


def test_the_pages(address, engine):
    status, page = get(f"{address}/")
    assert status == 200 and 'name="q"' in page and "10 images." in page and "/photo" not in page
    status, page = get(f"{address}/", q="a red star")
    links = re.findall(r'href="(/image/[^"]+)"', page)
    assert status == 200 and len(links) == 10 and 'value="a red star"' in page
    status, page = get(address + html.unescape(links[0]))
    assert status == 200 and "Captions that fit it best" in page and "Images like it" in page
    known = {*re.findall(r"<(\w+)", page)}
    for text in HOSTILE:
        status, page = get(f"{address}/", q=text.replace("\0", ""))
        assert status == 200 and {*re.findall(r"<(\w+)", page)} <= known and page.count("<title>") == 1


@needs_browser
@pytest.mark.slow
def test_in_a_browser(address, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    url = f"{address}/?{urllib.parse.urlencode({'q': HOSTILE[0]})}"
    done = subprocess.run(
        [str(BROWSER), *flags, "--enable-logging=stderr", url],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.count('class="card"') == 10 and "<title>owned" not in done.stdout
    assert "CONSOLE" not in done.stderr


@pytest.mark.slow
def test_a_thousand_requests_of_sixteen_clients(address):
    """None is lost or answered with somebody else's results."""
    right, seconds = under_load(address)
    assert right == len(seconds) == 1000


def test_mistakes_are_told_before_anything_is_loaded():
    with pytest.raises(ValueError, match="--port is 70000; expected 0 to 65535"):
        serve(gallery.toy(), gallery.toy_run(), port=70000)
    with pytest.raises(ValueError, match="none': no such folder"):
        serve(gallery.toy(page__pictures="none"), gallery.toy_run())


@pytest.mark.slow
def test_ctrl_c_ends_the_server(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import tests.train.toy\nfrom shnet_jax.cli import run\nrun()\n", "utf-8")
    command = [str(program), "serve", f"--workdir={gallery.toy_run()}", "--port=0"]
    with Program(command, tmp_path / "log") as process:
        assert process.until(lambda: "Ctrl-C ends it" in process.output()), process.output()
        process.send(signal.SIGINT)
        assert process.wait() == 0 and "Traceback" not in process.output(), process.output()


class Connection:
    """An upload of a photograph that ends when `release` is set. begun: its body is being read."""

    def __init__(self, release: asyncio.Event) -> None:
        self.begun, self.status, self._release = False, 0, release

    async def receive(self):
        self.begun = True
        await self._release.wait()
        return {"type": "http.request", "body": b"no picture", "more_body": False}

    async def send(self, message):
        self.status = message.get("status", self.status)


def upload(application, connection):
    scope = {"type": "http", "method": "POST", "path": "/photo", "query_string": b"", "headers": []}
    return application(scope, connection.receive, connection.send)


def test_few_photographs_are_read_at_once(engine):
    """Each takes 16 MiB; the others wait, and all are answered."""

    async def many():
        release = asyncio.Event()
        application = server.application(dataclasses.replace(engine, sight=lambda pictures, names: None))
        connections = [Connection(release) for _ in range(server.MAX_UPLOADS + 3)]
        requests = [asyncio.create_task(upload(application, connection)) for connection in connections]
        for _ in range(100):  # turns of the loop, of which a request needs a few
            await asyncio.sleep(0)
        reading = sum(connection.begun for connection in connections)
        release.set()
        await asyncio.gather(*requests)
        return reading, [connection.status for connection in connections]

    reading, statuses = asyncio.run(many())
    assert reading == server.MAX_UPLOADS and statuses == [400] * (server.MAX_UPLOADS + 3)


def test_a_client_that_sends_nothing_gives_its_place_to_others(engine, monkeypatch):
    monkeypatch.setattr(server, "READ_SECONDS", 0.01)

    async def silent():
        connection = Connection(asyncio.Event())
        await upload(server.application(dataclasses.replace(engine, sight=lambda pictures, names: None)), connection)
        return connection.status

    assert asyncio.run(silent()) == 408


def test_a_client_that_leaves_is_no_fault_of_the_server(engine):
    async def left():
        connection = Connection(asyncio.Event())
        application = server.application(dataclasses.replace(engine, sight=lambda pictures, names: None))
        connection.receive = lambda: asyncio.sleep(0, {"type": "http.disconnect"})
        await upload(application, connection)  # raises nothing
        return connection.status

    assert asyncio.run(left()) == 400
