"""A running server of the search page, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from shnet_jax.retrieve import server


@contextmanager
def serving(engine: server.Engine) -> Iterator[str]:
    """Address of a server of `engine`, which ends with the context."""
    settings = uvicorn.Config(server.application(engine), port=0, log_level="warning")
    listening = settings.bind_socket()
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    running.should_exit = True
    thread.join()
