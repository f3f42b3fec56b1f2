"""Concurrent tasks of an evaluation in threads, joined by bounded queues.

    with Overlap() as overlap:
        images = overlap.start(lambda: encode(image_tower, overlap.ahead(image_batches, 2), n))
        texts = overlap.start(lambda: encode(text_tower, overlap.ahead(text_batches, 2), t))
        rank(images.result(), texts.result())

A task that fails stops the others, and the block raises its error.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

_POLL = 0.05  # seconds after which a task that waits looks whether all was stopped


class Overlap:
    """A block whose tasks have all ended when it ends, well or not."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._started: list[Future[Any]] = []
        self._readers: list[Future[Any]] = []

    def __enter__(self) -> Overlap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                wait(self._started)
        finally:  # also when it is interrupted: threads that go on would keep the process alive
            self._stop.set()
        wait(self._started + self._readers)
        errors = (future.exception() for future in self._started + self._readers)
        first = next((e for e in errors if e is not None and not isinstance(e, _Stopped)), None)
        if first is not None and (error is None or isinstance(error, _Stopped)):
            raise first from None

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` in a thread. Ask for its result within the block: there, what stopped it is raised."""
        return self._run(work, self._started)

    def ahead(self, items: Iterable[T], maxsize: int) -> Iterator[T]:
        """Prefetches items: reads them in a thread of their own while the last one is being used.

        At most `maxsize` of them are read and not yet taken; until one is taken, nothing more is read.
        """
        if maxsize < 1:
            raise ValueError(f"a queue between tasks holds at least 1 item, got {maxsize}")
        return self._taken(items, maxsize)

    def _taken(self, items: Iterable[T], maxsize: int) -> Iterator[T]:
        read: queue.Queue[tuple[T] | None] = queue.Queue()
        # Not Queue(maxsize): its reader would hold one item more in its hand before it finds the queue full.
        slots = threading.Semaphore(maxsize)

        def reader() -> None:
            source = iter(items)
            while True:
                while not slots.acquire(timeout=_POLL):
                    self._check()
                self._check()
                try:
                    item = next(source)
                except StopIteration:
                    break
                read.put((item,))
            read.put(None)

        self._run(reader, self._readers)
        while (item := self._get(read)) is not None:
            slots.release()
            yield item[0]

    def _run(self, work: Callable[[], T], futures: list[Future[Any]]) -> Future[T]:
        def guarded() -> T:
            done = False
            try:
                value = work()
                done = True
            finally:
                if not done:
                    self._stop.set()
            return value

        pool = ThreadPoolExecutor(1)  # one thread for each: no task waits for another one to get its thread
        future = pool.submit(guarded)
        futures.append(future)
        pool.shutdown(wait=False)
        return future

    def _get(self, items: queue.Queue[T]) -> T:
        while True:
            self._check()
            try:
                return items.get(timeout=_POLL)
            except queue.Empty:
                continue

    def _check(self) -> None:
        if self._stop.is_set():
            raise _Stopped("another task failed")


class _Stopped(Exception):
    """Ends a task because another one failed, or because the block ended."""
