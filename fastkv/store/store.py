# SPDX-License-Identifier: Apache-2.0
"""`PageStore`: quantized KV pages in an external store, named by the tokens that they follow."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from fastkv.contracts.numbers import is_finite, is_integer
from fastkv.errors import ShapeError, SpecError
from fastkv.store import requests
from fastkv.store.backend import Backend
from fastkv.store.channel import Channel, NoAnswerError
from fastkv.store.counters import Reason, StoreCounters, Tally
from fastkv.store.keys import require_key
from fastkv.store.results import PageResults
from fastkv.store.value import PageFormat

if TYPE_CHECKING:
    from fastkv.transfer import Fingerprint, Regions
    from fastkv.transfer.regions import Ids

T = TypeVar("T")
Task = Callable[[Backend], list[T]]

#: Every name in the store begins so; the number changes with the hash chain or the value's layout.
_PREFIX = "fastkv:1"
#: Names asked for at once by `match`.
_MATCH_BATCH = 4096


class PageStore:
    """Puts a cache's pages into a store and gets them back.

    What the store does wrong is a miss: an error, a page that it forgot, one that is cut short,
    altered or of another cache. A page of the cache is written only with bytes that were verified
    whole, so a miss leaves it as it was. What the caller does wrong raises, before anything is
    sent or written.

    Calls may come from several threads. They wait for at most their deadline; where it passes, or
    the store fails otherwise, every call misses at once until the store answers again, which is
    tried out in the background. No constructor and no call raises because a store is down.

    Args:
        regions: the cache, in host memory.
        fingerprint: of the cache; stores of another fingerprint see none of its pages.
        backend: where the bytes are kept; closed by `close`.
        deadline: seconds that a call may wait for the store, all its pages together. Choose it for
            the largest call, or give such a call its own.
        cool_down: seconds from a failure until the store is tried out again.
        batch_bytes: of values in one message, at least one page; two messages are held at a time.

    Raises:
        SpecError: a time that is not above 0, or a batch below 1 byte.
    """

    def __init__(
        self,
        regions: "Regions",
        fingerprint: "Fingerprint",
        backend: Backend,
        *,
        deadline: float = 1.0,
        cool_down: float = 5.0,
        batch_bytes: int = 4 << 20,
    ) -> None:
        _require_positive("PageStore", "deadline", deadline)
        _require_positive("PageStore", "cool_down", cool_down)
        if not is_integer(batch_bytes) or batch_bytes < 1:
            expected = "an integer of at least 1"
            raise SpecError("PageStore", "batch_bytes", expected=expected, got=repr(batch_bytes))
        self._regions = regions
        self._digest = fingerprint.digest
        self._format = PageFormat(regions, self._digest)
        self._deadline = deadline
        self._batch = max(1, batch_bytes // self._format.nbytes)
        self._tally = Tally()
        self._channel = Channel(backend, deadline, cool_down, self._tally)

    def put(
        self, keys: Sequence[bytes], blocks: "Ids", *, deadline: float | None = None
    ) -> PageResults:
        """Keep copies of pages under their keys, over what is there.

        Pages must be full and hold still until the call returns.

        Args:
            keys: of `page_keys`, in any order.
            blocks: the page id of each key, 0 to N - 1; no page twice.
            deadline: seconds; None for the store's own.

        Raises:
            ShapeError: not as many keys as blocks.
            BatchValueError: a key that is none.
            BlockIdError: a block id that is out of range, or twice.
            SpecError: a deadline that is not above 0.
        """
        items = self._items("PageStore.put", keys, blocks)
        seconds = self._seconds("PageStore.put", deadline)
        began = monotonic()
        reasons: list[Reason | None] = []
        try:
            for kept in self._channel.run(self._puts(items), seconds):
                reasons += [None if ok else "refused" for ok in kept]
        except NoAnswerError as missing:
            reasons += [missing.reason] * (len(items) - len(reasons))
        count = reasons.count(None)
        self._tally.add(
            kept=count,
            bytes_written=count * self._format.nbytes,
            put_seconds=monotonic() - began,
        )
        self._tally.dropped(reasons)
        return PageResults(tuple(reasons))

    def get(
        self, keys: Sequence[bytes], blocks: "Ids", *, deadline: float | None = None
    ) -> PageResults:
        """Fill pages with what the store has under their keys.

        Args:
            keys: of `page_keys`, in any order.
            blocks: the page id to fill from each key, 0 to N - 1; no page twice.
            deadline: seconds; None for the store's own.

        Returns:
            Which pages were filled. The others hold what they held.

        Raises:
            ShapeError: not as many keys as blocks.
            BatchValueError: a key that is none.
            BlockIdError: a block id that is out of range, or twice.
            SpecError: a deadline that is not above 0.
        """
        items = self._items("PageStore.get", keys, blocks)
        seconds = self._seconds("PageStore.get", deadline)
        began = monotonic()
        reasons: list[Reason | None] = []
        try:
            for values in self._channel.run(self._gets(items), seconds):
                here = items[len(reasons) : len(reasons) + self._batch]
                reasons += [
                    "absent" if found is None else self._format.open(found, key, block)
                    for (key, block), found in zip(here, values, strict=True)
                ]
        except NoAnswerError as missing:
            reasons += [missing.reason] * (len(items) - len(reasons))
        count = reasons.count(None)
        self._tally.add(
            hits=count,
            bytes_read=count * self._format.nbytes,
            get_seconds=monotonic() - began,
        )
        self._tally.missed(reasons)
        return PageResults(tuple(reasons))

    def match(self, keys: Sequence[bytes], *, deadline: float | None = None) -> int:
        """How many pages the store has from the first key on, without a gap.

        Reads names only: `get` may still miss one. A store that does not answer has none.

        Args:
            keys: of `page_keys`, in order.
            deadline: seconds; None for the store's own.

        Raises:
            BatchValueError: a key that is none.
            SpecError: a deadline that is not above 0.
        """
        for key in keys:
            require_key("PageStore.match", "keys", key)
        seconds = self._seconds("PageStore.match", deadline)
        began = monotonic()
        found = 0
        try:
            for there in self._channel.run(self._matches(keys), seconds):
                leading = there.index(False) if False in there else len(there)
                found += leading
                if leading < len(there):
                    break
        except NoAnswerError:
            pass
        self._tally.add(matches=1, matched=found, match_seconds=monotonic() - began)
        return found

    def counters(self) -> StoreCounters:
        """What was done and missed until now."""
        return self._tally.snapshot(self._channel.state.value)

    def close(self) -> None:
        """Close the backend, after what is in flight; a call that follows raises RuntimeError."""
        self._channel.close()

    def __enter__(self) -> "PageStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _puts(self, items: list[tuple[bytes, int]]) -> Iterator["Task[bool]"]:
        for batch in requests.batches(items, self._batch):
            keys = [key for key, _ in batch]
            values = self._format.seal(keys, [block for _, block in batch])
            named = [(self._name(key), row.data) for key, row in zip(keys, values, strict=True)]
            yield partial(requests.mset, named)

    def _gets(self, items: list[tuple[bytes, int]]) -> Iterator["Task[bytes | None]"]:
        limit = self._format.nbytes + 1  # one more shows that a value is too long
        for batch in requests.batches(items, self._batch):
            yield partial(requests.mget, [self._name(key) for key, _ in batch], limit)

    def _matches(self, keys: Sequence[bytes]) -> Iterator["Task[bool]"]:
        for batch in requests.batches(keys, _MATCH_BATCH):
            yield partial(requests.exists, [self._name(key) for key in batch])

    def _name(self, key: bytes) -> bytes:
        # In hex, so that an operator can list or delete one cache's pages by a pattern.
        return f"{_PREFIX}:{self._digest}:{key.hex()}".encode()

    def _items(self, op: str, keys: Sequence[bytes], blocks: "Ids") -> list[tuple[bytes, int]]:
        ids = self._regions.check_ids(op, "blocks", blocks).tolist()
        if len(keys) != len(ids):
            raise ShapeError(op, "blocks", expected=f"{len(keys)}, one a key", got=str(len(ids)))
        for key in keys:
            require_key(op, "keys", key)
        return list(zip(keys, ids, strict=True))

    def _seconds(self, op: str, deadline: float | None) -> float:
        if deadline is None:
            return self._deadline
        _require_positive(op, "deadline", deadline)
        return deadline


def _require_positive(op: str, name: str, number: object) -> None:
    if not is_finite(number) or number <= 0:
        raise SpecError(op, name, expected="a number of seconds above 0", got=repr(number))
