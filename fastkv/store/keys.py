# SPDX-License-Identifier: Apache-2.0
"""Names of pages: each depends on every token before its end."""

import sys
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from fastkv.contracts.numbers import is_integer
from fastkv.errors import BatchValueError, DtypeError, ShapeError, SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bytes of a page's key.
KEY_BYTES = 32
#: Separates these hashes from any other use of BLAKE2b over the same bytes, and versions them.
_PERSON = b"fastkv.page.1"


def page_keys(
    tokens: Any, page_size: int, *, salt: bytes = b"", parent: bytes | None = None
) -> tuple[bytes, ...]:
    """The keys of a request's full pages, in order.

    A page's key is BLAKE2b-256 over the key of the page before it and its own token ids, so two
    pages share a key where all tokens up to their last agree, and the salt. The last tokens, short
    of a page, get none: their page is still written.

    What the pages hold is not hashed: a `PageStore` adds its cache's fingerprint, and with it the
    model's name, to every key.

    Args:
        tokens: token ids, `[T]`, integers of at most 64 bits: a list, or a tensor on the CPU.
        page_size: P, tokens a page.
        salt: what else the K and V of these tokens depend on (an adapter's name, digests of
            images), or whom they belong to: requests of different salts share no page.
        parent: the key of the page before `tokens`, to go on from; None at a request's start.
            The salt is in it.

    Returns:
        `T // page_size` keys of 32 bytes.

    Raises:
        SpecError: a page size below 1.
        DtypeError: tokens that are no integers, or a salt that is no bytes.
        ShapeError: tokens that are no vector.
        BatchValueError: a parent of another length, or one together with a salt.
    """
    if not is_integer(page_size) or page_size < 1:
        raise SpecError(
            "page_keys", "page_size", expected="an integer of at least 1", got=repr(page_size)
        )
    key = _root(page_size, salt) if parent is None else _continued(parent, salt)
    ids = _token_bytes(tokens)
    width = 8 * page_size
    keys = []
    for start in range(0, len(ids) - width + 1, width):
        key = _hash(key, ids[start : start + width])
        keys.append(key)
    return tuple(keys)


def _root(page_size: int, salt: bytes) -> bytes:
    if not isinstance(salt, bytes):
        raise DtypeError("page_keys", "salt", expected="bytes", got=type(salt).__name__)
    return _hash(page_size.to_bytes(8, "little"), salt)


def _continued(parent: bytes, salt: bytes) -> bytes:
    if salt:
        raise BatchValueError(
            "page_keys", "salt", expected="none beside a parent, which has it", got=repr(salt)
        )
    require_key("page_keys", "parent", parent)
    return parent


def require_key(op: str, argument: str, key: object) -> None:
    """Raise unless a value can be a page's key."""
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        got = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise BatchValueError(op, argument, expected=f"{KEY_BYTES} bytes of page_keys", got=got)


def _hash(before: bytes, data: "bytes | memoryview") -> bytes:
    # Every link hashes a head of fixed length, so the two parts cannot shift into each other.
    state = blake2b(before, digest_size=KEY_BYTES, person=_PERSON)
    state.update(data)
    return state.digest()


def _token_bytes(tokens: Any) -> bytes:
    """Token ids as little-endian int64, whatever their width was."""
    import numpy as np

    ids: NDArray[Any] = np.asarray(tokens)
    if ids.ndim != 1:
        raise ShapeError("page_keys", "tokens", expected="[T]", got=str(list(ids.shape)))
    if ids.dtype.kind not in "iu" and ids.size:
        raise DtypeError("page_keys", "tokens", expected="integers", got=str(ids.dtype))
    if ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max:
        raise BatchValueError(
            "page_keys", "tokens", expected="ids below 2**63", got=str(int(ids.max()))
        )
    wide = np.ascontiguousarray(ids, np.int64)
    return (wide if sys.byteorder == "little" else wide.byteswap()).tobytes()
