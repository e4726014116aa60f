# SPDX-License-Identifier: Apache-2.0
"""One thread that talks to a backend, so that nobody waits for it beyond a deadline.

A socket's own timeout begins anew with every byte that arrives, and looking up a host has none. A
caller therefore waits for this thread, and leaves it behind when time is up.
"""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs tasks in order on a daemon thread, which starts with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._closed = False
        self._lock = Lock()

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Queue a task; its future can be cancelled until it runs."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is closed")
            if self._thread is None:
                # A daemon: a thread that is stuck in a dead store does not keep the process alive.
                self._thread = Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._tasks.put((task, future))
        return future

    def close(self, last: Callable[[], None]) -> None:
        """Run `last` after what is queued, and end the thread; does not wait for it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._thread is not None:
                self._tasks.put((last, Future()))
                self._tasks.put(None)
                return
        last()

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None:
            task, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:  # the caller decides what it means
                future.set_exception(error)
            del item, task, future  # an idle thread holds no batch
