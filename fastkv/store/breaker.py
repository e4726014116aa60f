# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: after one failure a dead store costs nothing."""

from collections.abc import Callable
from enum import Enum
from threading import Lock


class State(str, Enum):
    """Of a store: `closed` is in use, `open` waits, `probing` is tried out in the background."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """Says whether to try a store.

    Args:
        cool_down: seconds after a failure until the store is tried again.
        clock: seconds, monotonic.
    """

    def __init__(self, cool_down: float, clock: Callable[[], float]) -> None:
        self._cool_down = cool_down
        self._clock = clock
        self._state = State.CLOSED
        self._retry_at = 0.0
        self._lock = Lock()

    @property
    def state(self) -> State:
        """What it is now."""
        return self._state

    def trip(self) -> bool:
        """Open it, from now on; whether it was closed before."""
        with self._lock:
            was_closed = self._state is State.CLOSED
            self._state = State.OPEN
            self._retry_at = self._clock() + self._cool_down
            return was_closed

    def claim_probe(self) -> bool:
        """Whether the store is due to be tried out: true to one caller, who then tells."""
        with self._lock:
            if self._state is not State.OPEN or self._clock() < self._retry_at:
                return False
            self._state = State.PROBING
            return True

    def mend(self) -> None:
        """Close it after a successful probe."""
        with self._lock:
            # A call that began before may have failed while the probe ran: then it stays open.
            if self._state is State.PROBING:
                self._state = State.CLOSED
