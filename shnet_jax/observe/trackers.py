"""Trackers beside metrics.jsonl: Weights & Biases, MLflow and trackio, each by its own client.

Where a tracker keeps its runs is for its own variables to say: WANDB_MODE and WANDB_ENTITY, MLFLOW_TRACKING_URI,
TRACKIO_DIR or TRACKIO_SERVER_URL, ... A run has one id, kept in WORKDIR/tracking_id.txt, by which it is found again
after an interruption. Steps that are made again after a kill are logged again, with the same values.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.observe.files import write_text
from shnet_jax.observe.sinks import Line, Sink

log = logging.getLogger(__name__)

ID = "tracking_id.txt"
CLOSE_SECONDS = 20.0
"""Seconds that the end of a run waits for lines that a tracker has not taken yet."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts to reach a tracker, at most."""
PARAMS_AT_ONCE, LONGEST_PARAM = 100, 6000
"""Bounds of MLflow on the parameters of one request, and on the characters of one."""


class Described(NamedTuple):
    """Description of a run for trackers. config: fields by dotted name. folder: for the tracker's own files."""

    id: str
    name: str
    project: str
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    folder: Path


class Client(Protocol):
    """An open run of a tracker; any method may raise."""

    def log(self, line: Line) -> None:
        """Sends the numbers of a line."""

    def close(self) -> None:
        """Ends the run there, finished or to be continued."""


class Wandb:
    """Weights & Biases. The x axis is "step": its own counter refuses steps that are made again."""

    def __init__(self, run: Described):
        import wandb

        self._run = wandb.init(
            id=run.id,
            resume="allow",
            name=run.name,
            project=run.project,
            tags=run.tags,
            config=dict(run.config),
            allow_val_change=True,  # of fields that may change between the runs of a work folder
            dir=run.folder,
            reinit="create_new",
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, line: Line) -> None:
        """Hands the line to the client, which sends it when it can."""
        self._run.log(line.scalars() | {"step": line.step})

    def close(self) -> None:
        """Waits until the client has sent everything."""
        self._run.finish()


class Mlflow:
    """MLflow. The server names runs, so ours is found by a tag with the id of the work folder."""

    TAG = "shnet_jax.tracking_id"

    def __init__(self, run: Described):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient()
        experiment = client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else client.create_experiment(run.project)
        earlier = client.search_runs([number], f"tags.`{self.TAG}` = '{run.id}'", max_results=1)
        sent: set[str] = set()
        if earlier:
            self._id, sent = earlier[0].info.run_id, {*earlier[0].data.params}
            client.update_run(self._id, status="RUNNING")
        else:
            tags = {self.TAG: run.id} | ({"tags": ", ".join(run.tags)} if run.tags else {})
            self._id = client.create_run(number, tags=tags, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in run.config.items() if name not in sent]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(self._id, params=params[first : first + PARAMS_AT_ONCE])

    def log(self, line: Line) -> None:
        """Sends the line in one request."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, line.step) for name, value in line.scalars().items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Marks the run as finished; it runs again when it is continued."""
        self._client.set_terminated(self._id)


class Trackio:
    """trackio. It finds a run by its name, which the id of the work folder therefore is a part of."""

    def __init__(self, run: Described):
        import trackio

        name = f"{run.name} {run.id[:8]}"
        config = dict(run.config) | {"tags": ", ".join(run.tags)}
        self._run = trackio.init(run.project, name=name, config=config, resume="allow", embed=False)

    def log(self, line: Line) -> None:
        """Hands the line to the client, which sends it when it can."""
        self._run.log(line.scalars(), step=line.step)

    def close(self) -> None:
        """Waits until the client has sent everything."""
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Described], Client]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}
"""The values of config.train.log_to; each is also the name of the package and of the extra."""


def check(names: Sequence[str]) -> None:
    """Raises ValueError for config.train.log_to with a name that is no tracker, or whose package is not installed."""
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"config.train.log_to has {unknown[0]!r}; choose from {', '.join(TRACKERS)}, or ()")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"config.train.log_to has {missing[0]!r}, whose package is not installed: pip install {missing[0]} (or pip "
            f"install -e '.[{missing[0]}]')"
        )


def open_trackers(config: ConfigDict | FrozenConfigDict, workdir: str | Path) -> list[Sink]:
    """A sink for each tracker of config.train.log_to; nothing is sent, or waited for, here."""
    train = config.train
    if not train.log_to:
        return []
    project, tags = train.log_project, tuple(train.log_tags)
    run = Described(run_id(Path(workdir)), config.name, project, tags, flat(config), Path(workdir))
    return [Background(name, partial(TRACKERS[name], run)) for name in train.log_to]


def run_id(workdir: Path) -> str:
    """The id of the run in a work folder; made when there is none."""
    path = workdir / ID
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, uuid.uuid4().hex + "\n")
    return path.read_text("utf-8").strip()


def flat(config: ConfigDict | FrozenConfigDict, prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration by dotted name: "train.batch_size"."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, ConfigDict | FrozenConfigDict)
        fields |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return fields


class Background:
    """Sink that hands lines to a tracker in a thread of its own, so that training never waits for a network.

    A tracker that cannot be reached, or refuses, is told of once and tried again, with growing pauses; lines wait in
    memory meanwhile. What it has not taken CLOSE_SECONDS after the end of the run is in metrics.jsonl alone.
    open_run: opens the run; called in the thread, again when it raises.
    """

    def __init__(self, name: str, open_run: Callable[[], Client], pause: float = 1.0):
        self._name, self._open_run, self._pause = name, open_run, pause
        self._client: Client | None = None
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._told = False
        self._left = 0  # lines that it did not take before the end
        self._thread = threading.Thread(target=self._send_all, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, line: Line) -> None:
        """Queues a line."""
        self._lines.put(line)

    def close(self) -> None:
        """Ends the run there once it has all lines, or CLOSE_SECONDS have passed."""
        self._lines.put(None)
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or self._left:
            log.warning("%s does not have the last lines of this run; metrics.jsonl has them all", self._name)

    def _send_all(self) -> None:
        while (line := self._lines.get()) is not None:
            pause = self._pause
            while not self._sent(line):
                if self._closing.is_set():
                    self._left += 1
                    break
                self._closing.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        if self._client is not None:
            self._guarded(self._client.close)

    def _sent(self, line: Line) -> bool:
        def send() -> None:
            if self._client is None:
                self._client = self._open_run()
            self._client.log(line)

        return self._guarded(send)

    def _guarded(self, act: Callable[[], None]) -> bool:
        try:
            act()
            return True
        except BaseException as error:  # a client may end its process by SystemExit
            if not self._told:
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                log.warning(
                    "%s: %s. Training goes on, and tries again; metrics.jsonl has every line", self._name, reason[:300]
                )
            self._told = True
            return False
