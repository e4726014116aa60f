# SPDX-License-Identifier: Apache-2.0
"""What a `PageStore` asks of the thing that keeps its bytes."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Backend(Protocol):
    """Bytes by name, somewhere else.

    It may forget any name at any time, and raise whatever it likes: a `PageStore` makes a miss of
    it, tells from `TimeoutError` that it was late, and checks every value that comes back. Only
    one thread calls it, which is not the one that made it.
    """

    def mset(self, items: Sequence[tuple[bytes, bytes | memoryview]]) -> list[bool]:
        """Keep values under their names; whether each was taken, in order."""

    def mget(self, names: Sequence[bytes], limit: int) -> list[bytes | None]:
        """The first `limit` bytes of each value, None of a name that is not there."""

    def exists(self, names: Sequence[bytes]) -> list[bool]:
        """Whether each name is there."""

    def close(self) -> None:
        """Let go of connections."""
