# SPDX-License-Identifier: Apache-2.0
"""A page as a value: a header that a reader can foretell, the page's bytes, a checksum.

Offsets in bytes, numbers little-endian:

| from | bytes | field |
|---|---|---|
| 0 | 8 | magic, `fastkvPg` |
| 8 | 4 | version of this layout |
| 12 | 4 | bytes of the header |
| 16 | 16 | digest of the cache's fingerprint |
| 32 | 32 | key of the page |
| 64 | 8 | bytes of the page |
| 72 | | the page, as `fastkv.transfer.Regions` orders it |
| end | 8 | xxh3_64 of all of the above |

A reader knows every field of the header, so it compares them in one go.
"""

import struct
from typing import TYPE_CHECKING

from fastkv.store.counters import Reason
from fastkv.store.keys import KEY_BYTES
from fastkv.transfer.xxh3 import checksum

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastkv.transfer import Regions

MAGIC = b"fastkvPg"
VERSION = 1
_FIELDS = struct.Struct(f"<8sII16s{KEY_BYTES}sQ")
_CHECKSUM = struct.Struct("<Q")


class PageFormat:
    """Values of one cache's pages.

    Args:
        regions: the cache.
        fingerprint: its digest, in hexadecimal digits.
    """

    def __init__(self, regions: "Regions", fingerprint: str) -> None:
        self._regions = regions
        self._fingerprint = bytes.fromhex(fingerprint)
        self._page = slice(_FIELDS.size, _FIELDS.size + regions.block_nbytes)
        self._covered = self._page.stop
        #: Bytes of a value.
        self.nbytes = self._covered + _CHECKSUM.size

    def seal(self, keys: list[bytes], blocks: list[int]) -> "NDArray[np.uint8]":
        """The values of pages under their keys, uint8 `[len(keys), nbytes]`."""
        import numpy as np

        values = np.empty((len(keys), self.nbytes), np.uint8)
        self._regions.read_blocks(blocks, values[:, self._page])
        for row, key in zip(values, keys, strict=True):
            view = row.data
            _FIELDS.pack_into(view, 0, *self._header(key))
            _CHECKSUM.pack_into(view, self._covered, checksum(view[: self._covered]))
        return values

    def open(self, value: object, key: bytes, block: int) -> Reason | None:
        """Write a page if a value is the key's; else say why not, and leave the page alone."""
        if not isinstance(value, bytes) or len(value) != self.nbytes:
            return "invalid"
        if value[: _FIELDS.size] != _FIELDS.pack(*self._header(key)):
            return "invalid"
        view = memoryview(value)
        (stored,) = _CHECKSUM.unpack_from(value, self._covered)
        if stored != checksum(view[: self._covered]):
            return "checksum"
        self._regions.write_block(block, view[self._page])
        return None

    def _header(self, key: bytes) -> tuple[bytes, int, int, bytes, bytes, int]:
        page_bytes = self._regions.block_nbytes
        return MAGIC, VERSION, _FIELDS.size, self._fingerprint, key, page_bytes
