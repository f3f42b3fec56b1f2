"""The metrics of a run as TensorBoard's events."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from shnet_jax.observe.sinks import Line


class TensorBoard:
    """Sink that writes TensorBoard's events in the calling thread.

    tensorboardX's own SummaryWriter has a thread of its own: that dies of a full disk, and the queue to it then fills
    until training waits forever.
    purge_step: TensorBoard forgets what it knows of this step and later ones.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, line: Line) -> None:
        """Writes an event for each number and flushes them."""
        for name, value in line.scalars().items():
            self._add(Event(step=line.step, summary=scalar(name, value)))
        self._events.flush()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def close(self) -> None:
        """Closes the file."""
        self._events.close()
