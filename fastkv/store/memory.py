# SPDX-License-Identifier: Apache-2.0
"""A store within the process: for tests, examples, and pages kept in the host's memory."""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from fastkv.contracts.numbers import is_integer
from fastkv.errors import SpecError


class InMemoryBackend:
    """Values in a dictionary; the least recently used go first.

    Several stores may share one: unlike what `Backend` asks for, it takes calls of any thread.

    Args:
        capacity: bytes of names and values that it keeps; None for no limit.

    Raises:
        SpecError: a capacity below 1.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is not None and (not is_integer(capacity) or capacity < 1):
            raise SpecError(
                "InMemoryBackend",
                "capacity",
                expected="an integer of at least 1, or None",
                got=repr(capacity),
            )
        self._capacity = capacity
        self._values: OrderedDict[bytes, bytes] = OrderedDict()
        self._held = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all names and values."""
        return self._held

    def __len__(self) -> int:
        return len(self._values)

    def mset(self, items: Sequence[tuple[bytes, bytes | memoryview]]) -> list[bool]:
        """Keep copies of values; one larger than the capacity is not taken."""
        with self._lock:
            return [self._set(name, bytes(value)) for name, value in items]

    def mget(self, names: Sequence[bytes], limit: int) -> list[bytes | None]:
        """The first `limit` bytes of each value, None of a name that is not there."""
        with self._lock:
            return [self._get(name, limit) for name in names]

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Whether each name is there; does not count as a use."""
        with self._lock:
            return [name in self._values for name in names]

    def close(self) -> None:
        """Keeps the values: another store may use them."""

    def _set(self, name: bytes, value: bytes) -> bool:
        size = len(name) + len(value)
        self._forget(name)
        if self._capacity is not None:
            if size > self._capacity:
                return False
            while self._held + size > self._capacity:
                self._forget(next(iter(self._values)))
        self._values[name] = value
        self._held += size
        return True

    def _get(self, name: bytes, limit: int) -> bytes | None:
        value = self._values.get(name)
        if value is None:
            return None
        self._values.move_to_end(name)
        return value[:limit]

    def _forget(self, name: bytes) -> None:
        value = self._values.pop(name, None)
        if value is not None:
            self._held -= len(name) + len(value)
