# SPDX-License-Identifier: Apache-2.0
"""Calls of a backend: each with a deadline, and none while the store is unavailable."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from functools import partial
from time import monotonic
from typing import TypeVar

from fastkv.store.backend import Backend
from fastkv.store.breaker import Breaker, State
from fastkv.store.counters import Reason, Tally
from fastkv.store.worker import Worker

T = TypeVar("T")

_LOGGER = logging.getLogger("fastkv.store")
#: Batches between the caller and the store: one is sent while the next is made, or the last read.
_WINDOW = 2
#: Asked for to see whether a store answers; no page has this name.
_PROBE = b"fastkv:probe"


class NoAnswerError(Exception):
    """The store did not answer; never leaves this package."""

    def __init__(self, reason: Reason) -> None:
        self.reason: Reason = reason
        super().__init__(reason)


class Channel:
    """The one way to a backend.

    Args:
        backend: what keeps the bytes.
        deadline: seconds within which a probe must be answered.
        cool_down: seconds from a failure to the next probe.
        tally: counts outages.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        backend: Backend,
        deadline: float,
        cool_down: float,
        tally: Tally,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._backend = backend
        self._deadline = deadline
        self._tally = tally
        self._clock = clock
        self._breaker = Breaker(cool_down, clock)
        self._worker = Worker("fastkv.store")

    @property
    def state(self) -> State:
        """Whether the store is in use."""
        return self._breaker.state

    def run(self, tasks: Iterable[Callable[[Backend], T]], deadline: float) -> Iterator[T]:
        """What each task returns, in order.

        At most two batches exist at a time: tasks are taken from the iterable as room comes.

        Args:
            tasks: called with the backend, on another thread.
            deadline: seconds from now, for all tasks together.

        Raises:
            NoAnswerError: the store is unavailable, or has just become so.
        """
        until = self._clock() + deadline
        self._require_available()
        waiting: deque[futures.Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(self._worker.submit(partial(task, self._backend)))
                if len(waiting) == _WINDOW:
                    yield self._result(waiting.popleft(), until)
            while waiting:
                yield self._result(waiting.popleft(), until)
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Close the backend after what is in flight."""
        self._worker.close(self._backend.close)

    def _require_available(self) -> None:
        # In the background: no caller waits to learn that a dead store is still dead.
        if self._breaker.claim_probe():
            self._worker.submit(self._probe)
        if self._breaker.state is not State.CLOSED:
            raise NoAnswerError("unavailable")

    def _result(self, future: "futures.Future[T]", until: float) -> T:
        try:
            return future.result(max(0.0, until - self._clock()))
        except (TimeoutError, futures.TimeoutError) as error:  # two classes before Python 3.11
            # One that had not begun waited for other threads' calls, not for the store.
            if not future.cancel():
                self._trip(str(error) or "no answer within the deadline")
            raise NoAnswerError("timeout") from error
        except Exception as error:  # a backend may raise whatever it likes
            self._trip(f"{type(error).__name__}: {error}")
            raise NoAnswerError("error") from error

    def _probe(self) -> None:
        began = self._clock()
        try:
            self._backend.exists([_PROBE])
        except Exception as error:  # as above
            self._trip(f"{type(error).__name__}: {error}")
            return
        if self._clock() - began > self._deadline:
            self._trip("a probe was answered after the deadline")
        else:
            self._breaker.mend()

    def _trip(self, what: str) -> None:
        new = self._breaker.trip()
        self._tally.outage(what, new=new)
        if new:
            _LOGGER.warning("store unavailable, every page is a miss until it answers: %s", what)
