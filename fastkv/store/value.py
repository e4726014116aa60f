# SPDX-License-Identifier: Apache-2.0
"""A page as a value: a header that a reader can foretell, a checksum, and the page's bytes.

Offsets in bytes, numbers little-endian:

| from | bytes | field |
|---|---|---|
| 0 | 8 | magic, `fastkvPg` |
| 8 | 4 | version of this layout |
| 12 | 4 | bytes of the header, checksum included |
| 16 | 32 | digest of the cache's fingerprint |
| 48 | 32 | key of the page |
| 80 | 8 | bytes of the page |
| 88 | 8 | xxh3_64 of all of the above and the page |
| 96 | | the page: of each layer K, V, and the paged scales of K and V |

A reader knows every field before the checksum, so it compares them in one go.
"""

import struct

from fastkv.store.counters import Reason
from fastkv.store.keys import KEY_BYTES
from fastkv.transfer.checksum import checksum

MAGIC = b"fastkvPg"
VERSION = 1
_FIELDS = struct.Struct(f"<8sII32s{KEY_BYTES}sQ")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


def header(fingerprint: bytes, key: bytes, page_bytes: int) -> bytes:
    """All of a header but the checksum."""
    return _FIELDS.pack(MAGIC, VERSION, HEADER_BYTES, fingerprint, key, page_bytes)


def seal(value: bytearray, fields: bytes) -> None:
    """Write the header of a value whose page is already in place."""
    page = memoryview(value)[HEADER_BYTES:]
    value[: _FIELDS.size] = fields
    _CHECKSUM.pack_into(value, _FIELDS.size, checksum(fields, page))


def fault(value: bytes, fields: bytes, page_bytes: int) -> Reason | None:
    """Why a value is not the page that its header should name; None where it is."""
    if len(value) != HEADER_BYTES + page_bytes or value[: _FIELDS.size] != fields:
        return "invalid"
    (stored,) = _CHECKSUM.unpack_from(value, _FIELDS.size)
    return None if stored == checksum(fields, page_of(value)) else "checksum"


def page_of(value: bytes) -> memoryview:
    """The page within a value, without a copy."""
    return memoryview(value)[HEADER_BYTES:]
