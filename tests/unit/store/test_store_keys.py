# SPDX-License-Identifier: Apache-2.0
"""Keys of pages: a chain over all tokens before a page's end."""

import random
import struct
from hashlib import blake2b

import numpy as np
import pytest

from fastkv.errors import BatchValueError, DtypeError, ShapeError, SpecError
from fastkv.store import page_keys


def tokens_of(seed, count):
    rng = random.Random(seed)
    return [rng.randrange(150_000) for _ in range(count)]


def by_hand(tokens, page_size, salt=b""):
    """The chain as the documentation states it, written out."""

    def digest(*parts):
        return blake2b(b"".join(parts), digest_size=32, person=b"fastkv.page.1").digest()

    key, keys = digest(struct.pack("<Q", page_size), salt), []
    for page in range(len(tokens) // page_size):
        ids = tokens[page * page_size : (page + 1) * page_size]
        key = digest(key, struct.pack(f"<{page_size}q", *ids))
        keys.append(key)
    return tuple(keys)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_keys_are_the_documented_chain(page_size):
    tokens = tokens_of(page_size, 5 * page_size + page_size // 2)
    for salt in (b"", b"adapter 7"):
        assert page_keys(tokens, page_size, salt=salt) == by_hand(tokens, page_size, salt)


def test_only_full_pages_have_keys():
    tokens = tokens_of(1, 48)
    lengths = [len(page_keys(tokens[:count], 16)) for count in (0, 1, 15, 16, 17, 31, 32, 47, 48)]
    assert lengths == [0, 0, 0, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("changed", [0, 15, 16, 40, 63])
def test_a_token_changes_its_page_and_all_pages_behind(changed):
    tokens = tokens_of(2, 64)
    other = list(tokens)
    other[changed] += 1
    same = [a == b for a, b in zip(page_keys(tokens, 16), page_keys(other, 16), strict=True)]
    page = changed // 16
    assert same == [True] * page + [False] * (4 - page)


def test_page_size_and_salt_separate():
    tokens = tokens_of(3, 64)
    found = [
        *page_keys(tokens, 16),
        *page_keys(tokens, 32),
        *page_keys(tokens, 16, salt=b"a"),
        *page_keys(tokens, 16, salt=b"b"),
    ]
    assert len(set(found)) == len(found)


def test_equal_pages_at_other_places_have_other_keys():
    page = tokens_of(4, 16)
    assert len(set(page_keys(page * 4, 16))) == 4


@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_a_chain_goes_on_from_its_parent(salt):
    tokens = tokens_of(5, 96)
    whole = page_keys(tokens, 16, salt=salt)
    for done in range(1, 6):
        assert page_keys(tokens[16 * done :], 16, parent=whole[done - 1]) == whole[done:]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64, np.uint16, ">i4"])
def test_the_width_of_ids_does_not_count(dtype):
    tokens = [token % 60_000 for token in tokens_of(6, 40)]
    assert page_keys(np.array(tokens, dtype), 8) == by_hand(tokens, 8)
    assert page_keys(np.array(tokens * 2, dtype).reshape(-1, 2)[:, 0], 8) == by_hand(
        (tokens * 2)[::2], 8
    )


def test_negative_ids_are_ids():
    tokens = [-1, 5, -7, 2**62]
    assert page_keys(tokens, 2) == by_hand(tokens, 2)


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (SpecError, "page_size", lambda: page_keys([1, 2], 0)),
        (SpecError, "page_size", lambda: page_keys([1, 2], True)),
        (SpecError, "page_size", lambda: page_keys([1, 2], 2.0)),
        (DtypeError, "tokens", lambda: page_keys([1.5, 2.0], 1)),
        (DtypeError, "tokens", lambda: page_keys([True, False], 1)),
        (DtypeError, "tokens", lambda: page_keys(["a"], 1)),
        (DtypeError, "salt", lambda: page_keys([1, 2], 1, salt="text")),
        (ShapeError, "tokens", lambda: page_keys([[1, 2]], 1)),
        (BatchValueError, "tokens", lambda: page_keys(np.array([2**63], np.uint64), 1)),
        (BatchValueError, "parent", lambda: page_keys([1, 2], 1, parent=b"short")),
        (BatchValueError, "parent", lambda: page_keys([1, 2], 1, parent="x" * 32)),
        (BatchValueError, "salt", lambda: page_keys([1, 2], 1, parent=bytes(32), salt=b"s")),
    ],
)
def test_what_is_refused(error, argument, call):
    with pytest.raises(error) as caught:
        call()
    assert (caught.value.op, caught.value.argument) == ("page_keys", argument)
