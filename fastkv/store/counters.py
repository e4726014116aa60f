# SPDX-License-Identifier: Apache-2.0
"""What a store counts, and the table of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from threading import Lock
from typing import Literal, get_args

#: Why a page was not filled, or not kept:
#:
#: - `absent`: the store does not have it (any more).
#: - `invalid`: what the store has is not that page: cut short, another format or version, garbage.
#: - `checksum`: it looks like that page, and a byte differs.
#: - `refused`: the store did not take it: full, or larger than it allows.
#: - `timeout`: the deadline passed.
#: - `error`: the store is not to be reached, or answered with an error.
#: - `unavailable`: not tried, because a call failed a short while ago.
Reason = Literal["absent", "invalid", "checksum", "refused", "timeout", "error", "unavailable"]
REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True, slots=True)
class StoreCounters:
    """What a `PageStore` did since it was made; `str()` is a table.

    Attributes:
        hits: pages filled by `get`.
        misses: pages that `get` did not fill, by reason.
        kept: pages that `put` gave to the store.
        dropped: pages that `put` did not, by reason.
        matches: calls of `match`.
        matched: pages that they found.
        bytes_read: of values that filled a page, headers included.
        bytes_written: of values that the store took.
        get_seconds: spent in `get`, waiting included.
        put_seconds: spent in `put`.
        match_seconds: spent in `match`.
        outages: how often the store became unavailable.
        state: `closed` (in use), `open` (unavailable) or `probing` (being tried out).
        last_error: what the last failure said; empty if there was none.
    """

    hits: int
    misses: Mapping[str, int]
    kept: int
    dropped: Mapping[str, int]
    matches: int
    matched: int
    bytes_read: int
    bytes_written: int
    get_seconds: float
    put_seconds: float
    match_seconds: float
    outages: int
    state: str
    last_error: str

    @property
    def hit_rate(self) -> float:
        """Hits over pages asked for; 0 before the first."""
        asked = self.hits + sum(self.misses.values())
        return self.hits / asked if asked else 0.0

    def __str__(self) -> str:
        rows = [
            ("get: hits", f"{self.hits} ({self.hit_rate:.1%})"),
            *((f"get: {reason}", str(count)) for reason, count in self.misses.items()),
            ("get: rate", _rate(self.bytes_read, self.get_seconds)),
            ("put: kept", str(self.kept)),
            *((f"put: {reason}", str(count)) for reason, count in self.dropped.items()),
            ("put: rate", _rate(self.bytes_written, self.put_seconds)),
            ("match", f"{self.matched} pages, {self.matches} calls, {self.match_seconds:.3f} s"),
            ("breaker", f"{self.state}, outages {self.outages}"),
        ]
        if self.last_error:
            rows.append(("last error", self.last_error))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _rate(count: int, seconds: float) -> str:
    speed = count / seconds / 1e9 if seconds else 0.0
    return f"{count} bytes, {seconds:.3f} s, {speed:.2f} GB/s"


class Tally:
    """Adds up, from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        plain = [f.name for f in fields(StoreCounters) if f.name not in _ELSEWHERE]
        self._sums: dict[str, float] = dict.fromkeys(plain, 0)
        self._misses: dict[str, int] = {}
        self._dropped: dict[str, int] = {}
        self._last_error = ""

    def add(self, **amounts: float) -> None:
        """Add to counters by name."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    def missed(self, reasons: Iterable[Reason | None]) -> None:
        """Count the pages that a `get` did not fill."""
        self._count(self._misses, reasons)

    def dropped(self, reasons: Iterable[Reason | None]) -> None:
        """Count the pages that a `put` did not leave in the store."""
        self._count(self._dropped, reasons)

    def outage(self, error: str, *, new: bool) -> None:
        """Remember a failure, and count it where the store was in use before."""
        with self._lock:
            self._last_error = error
            self._sums["outages"] += new

    def snapshot(self, state: str) -> StoreCounters:
        """What was counted until now."""
        with self._lock:
            return StoreCounters(
                **self._sums,  # type: ignore[arg-type]  # named as the fields
                misses=_ordered(self._misses),
                dropped=_ordered(self._dropped),
                state=state,
                last_error=self._last_error,
            )

    def _count(self, counts: dict[str, int], reasons: Iterable[Reason | None]) -> None:
        with self._lock:
            for reason in reasons:
                if reason is not None:
                    counts[reason] = counts.get(reason, 0) + 1


_ELSEWHERE = ("misses", "dropped", "state", "last_error")


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in REASONS if name in counts}
