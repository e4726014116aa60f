# SPDX-License-Identifier: Apache-2.0
"""Batches of a call, as tasks for the thread that talks to the backend."""

from collections.abc import Iterator, Sequence, Sized
from typing import TypeVar

from fastkv.store.backend import Backend

T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Runs of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def mset(items: list[tuple[bytes, memoryview]], backend: Backend) -> list[bool]:
    """Keep values; whether each was taken."""
    return _one_each(items, backend.mset(items))


def mget(names: list[bytes], limit: int, backend: Backend) -> list[bytes | None]:
    """The first `limit` bytes of each value."""
    return _one_each(names, backend.mget(names, limit))


def exists(names: list[bytes], backend: Backend) -> list[bool]:
    """Whether each name is there."""
    return _one_each(names, backend.exists(names))


def _one_each(asked: Sized, replies: list[T]) -> list[T]:
    """A backend that answers less than was asked has failed; its answers have no order."""
    if len(replies) != len(asked):
        raise RuntimeError(f"{len(replies)} answers to {len(asked)} names")
    return replies
