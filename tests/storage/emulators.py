"""Servers that stand for S3 and for Google's storage, and a proxy before one that fails on purpose."""

from __future__ import annotations

import http.client
import importlib.util
import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import pytest

BUCKET = "emulated"
S3 = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
# gcsfs asks for the kind of a bucket by gRPC, which the emulator lacks; it reads the switch when it is imported.
GS = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
PACKAGES = {"s3": ("s3fs", "moto", "flask", "flask_cors"), "gs": ("gcsfs", "gcp_storage_emulator")}


def missing(scheme: str) -> str:
    """The packages for the scheme and its emulator that are not installed, "" for none."""
    return " and ".join(package for package in PACKAGES[scheme] if importlib.util.find_spec(package) is None)


def needs(scheme: str) -> pytest.MarkDecorator:
    """Skips a test where a package for the scheme, or its emulator, is not installed."""
    return pytest.mark.skipif(bool(missing(scheme)), reason=f"{missing(scheme)} not installed: make setup")


@contextmanager
def s3() -> Iterator[tuple[str, dict[str, str]]]:
    """Moto's S3 with one bucket: its address, and the environment of a process that uses it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        _request(address, "PUT", f"/{BUCKET}")
        yield address, S3 | {"AWS_ENDPOINT_URL": address}
    finally:
        server.stop()


@contextmanager
def gs() -> Iterator[tuple[str, dict[str, str]]]:
    """Google's storage with one bucket, as `s3`."""
    from gcp_storage_emulator import server as emulator

    with mock.patch.object(emulator, "_read_data", partial(_read_data, emulator._read_data)):
        server = emulator.create_server("127.0.0.1", _free_port(), in_memory=True, default_bucket=BUCKET)
        server.start()
        try:
            address = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
            yield address, GS | {"STORAGE_EMULATOR_HOST": address}
        finally:
            server.stop()


def _read_data(of_others: Callable[..., Any], handler: Any, query: Any) -> Any:
    """The body of a request. The emulator alone would read an upload as mail, and drop a carriage return at its end."""
    from gcp_storage_emulator import server as emulator

    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return of_others(handler, query)
    boundary = re.search(r"boundary=['\"]?([^'\";]+)", kind)[1].encode()  # type: ignore[index]
    _, about, content, _ = emulator._read_raw_data(handler).split(b"--" + boundary)
    line = b"\r\n" if about.startswith(b"\r\n") else b"\n"
    (_, meta), (header, content) = (part.removesuffix(line).split(2 * line, 1) for part in (about, content))
    kinds = re.search(rb"(?i)content-type: *([^\s;]+)", header)
    return {
        "meta": json.loads(meta),
        "content": content,
        "content-type": kinds[1].decode() if kinds else "application/octet-stream",
    }


EMULATORS = {"s3": s3, "gs": gs}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _request(address: str, method: str, path: str) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    connection.request(method, path)
    assert connection.getresponse().status == 200
    connection.close()


class Faults:
    """What the proxy did: counts of "error", "reset" and "silence", one of which happens to a part of the requests."""

    def __init__(self, share: float, silence: float):
        self.share, self.silence = share, silence
        self.counts = dict.fromkeys(("error", "reset", "silence"), 0)
        self._random, self._lock, self._last = random.Random(0), threading.Lock(), False

    def next(self) -> str:
        """The fault of the next request, "" for none; never two in a row, so that no request fails for good."""
        with self._lock:
            self._last = not self._last and self._random.random() < self.share
            if not self._last:
                return ""
            fault = min(self.counts, key=self.counts.__getitem__)
            self.counts[fault] += 1
            return fault


@contextmanager
def proxy(address: str, faults: Faults) -> Iterator[str]:
    """A server that passes requests on to `address` and answers some with 500, a reset, or not in time."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = faults.next()
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            if fault == "silence":
                time.sleep(faults.silence)
                self.close_connection = True
                return
            if fault == "error":
                self._send(500, [], b"the proxy failed on purpose")
                return
            behind = http.client.HTTPConnection(address.removeprefix("http://"))
            behind.request(self.command, self.path, body, dict(self.headers))
            response = behind.getresponse()
            self._send(response.status, response.getheaders(), response.read())
            behind.close()

        def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            length = str(len(body))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
