"""--mode=serve: a search page of a run in the browser, with a JSON interface."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax.modes.photo_query import Sight, check_encoder, open_sight, sees_photographs
from shnet_jax.modes.search import open_search
from shnet_jax.retrieve.scene import check_pictures, find_pictures
from shnet_jax.training.load import Loaded

log = logging.getLogger(__name__)


def serve(config: ConfigDict, workdir: str | Path, host: str = "127.0.0.1", port: int = 8765, device: str = "") -> None:
    """Serves config.search.split of the run in `workdir` until it is interrupted.

    Embeddings that are missing are made first.

    Args:
      config, workdir: of the run.
      host: address that is listened at; the default is for this machine alone.
      port: 0 for a free one.
      device: of PyTorch, for new photographs in a run of `shnet photos`; "": a GPU if there is one.

    Raises ValueError without the packages of the extra `serve`, or for a port in use.
    """
    try:
        import uvicorn

        from shnet_jax.retrieve import server
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'shnet_jax[serve]'") from None
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; expected 0 to 65535")
    check_pictures(config.page.pictures)
    loaded, tower, searcher = open_search(config, Path(workdir))
    pictures = find_pictures(config.page.pictures, loaded.experiment.dataset)
    sight = _sight(loaded, config, Path(workdir), device)
    engine = server.Engine(loaded.experiment, loaded.variables, tower, searcher, pictures, sight)
    log.info("compiling the programs of a search")
    server.warm_up(engine)
    settings = uvicorn.Config(server.application(engine), host=host, port=port, log_level="warning")
    listening = settings.bind_socket()  # exits with a message when the port is taken
    if host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("--host=%s: every machine that reaches this one can search, without a password", host)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            name, number = listening.getsockname()[:2]
            print(f"http://{name}:{number}  searches {engine.images} images; Ctrl-C ends it", flush=True)

    with suppress(KeyboardInterrupt):  # uvicorn raises it after all requests under way are answered
        Server(settings).run(sockets=[listening])


def _sight(loaded: Loaded, config: ConfigDict, workdir: Path, device: str) -> Sight | None:
    """The encoder of new photographs; None for a run without one, or, with a warning, where it cannot be loaded."""
    if not sees_photographs(config):
        return None
    try:
        return open_sight(loaded, config, check_encoder(config, workdir), device)
    except (ValueError, OSError) as error:
        log.warning("no search by a new photograph: %s", error)
        return None
