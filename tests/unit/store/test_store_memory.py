# SPDX-License-Identifier: Apache-2.0
"""The backend within the process: capacity, and what it forgets first."""

import random

import pytest

from fastkv.errors import SpecError
from fastkv.store import Backend, InMemoryBackend


def value(seed, size=90):
    return random.Random(seed).randbytes(size)


def name(i):
    return f"name-{i:05}".encode()  # 10 bytes: 100 with a value


def test_is_a_backend():
    assert isinstance(InMemoryBackend(), Backend)


def test_values_come_back_and_absent_names_are_none():
    store = InMemoryBackend()
    assert store.mset([(name(i), value(i)) for i in range(3)]) == [True] * 3
    assert store.mget([name(2), name(9), name(0)], 1000) == [value(2), None, value(0)]
    assert store.exists([name(1), name(9)]) == [True, False]
    assert len(store) == 3
    assert store.nbytes == 300


def test_a_read_is_limited():
    store = InMemoryBackend()
    store.mset([(name(0), value(0))])
    assert store.mget([name(0)], 40) == [value(0)[:40]]


def test_values_are_copies():
    store, mine = InMemoryBackend(), bytearray(value(0))
    store.mset([(name(0), memoryview(mine))])
    mine[:] = value(1)
    assert store.mget([name(0)], 1000) == [value(0)]


def test_the_least_recently_used_goes_first():
    store = InMemoryBackend(capacity=399)
    store.mset([(name(i), value(i)) for i in range(3)])
    store.mget([name(0)], 1)  # a use
    store.exists([name(1)])  # none
    assert store.mset([(name(3), value(3))]) == [True]
    assert store.exists([name(i) for i in range(4)]) == [True, False, True, True]
    store.mset([(name(2), value(22))])  # written again: a use
    store.mset([(name(4), value(4))])
    assert store.exists([name(i) for i in range(5)]) == [False, False, True, True, True]
    assert store.nbytes == 300


def test_one_larger_than_the_capacity_is_not_taken_and_its_old_value_gone():
    store = InMemoryBackend(capacity=250)
    store.mset([(name(0), value(0)), (name(1), value(1))])
    assert store.mset([(name(0), value(5, 241)), (name(2), value(2, 240))]) == [False, True]
    assert store.exists([name(0), name(1), name(2)]) == [False, False, True]
    assert store.nbytes == 250


def test_closing_keeps_the_values():
    store = InMemoryBackend()
    store.mset([(name(0), value(0))])
    store.close()
    assert store.mget([name(0)], 1000) == [value(0)]


@pytest.mark.parametrize("capacity", [0, -1, 1.5, True])
def test_a_capacity_is_a_positive_integer(capacity):
    with pytest.raises(SpecError, match="InMemoryBackend: capacity"):
        InMemoryBackend(capacity)
