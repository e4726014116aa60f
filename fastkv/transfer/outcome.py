# SPDX-License-Identifier: Apache-2.0
"""What became of a transfer, and what became of all of them."""

from dataclasses import dataclass, field, fields
from enum import Enum


class TransferState(str, Enum):
    """How a transfer ended for this side."""

    #: The receiver has verified and published every block.
    DONE = "done"
    #: Nothing was published, and nothing moves any more.
    FAILED = "failed"
    #: The deadline has passed, or the peer was lost, and the engine may still move bytes, or the
    #: receiver's word is missing. What may still be touched is quarantined until it settles.
    IN_DOUBT = "in doubt"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Outcome:
    """One transfer.

    Attributes:
        request: its name.
        generation: the number of this attempt at the side that began it.
        state: how it ended.
        blocks: ids in this cache: the source of a push; the published blocks of a pull that is
            DONE, which belong to the caller now; else empty.
        nbytes: bytes of K, V and scales asked for.
        seconds: from the call to this outcome.
        reason: why it is not DONE.
    """

    request: str
    generation: int
    state: TransferState
    blocks: tuple[int, ...]
    nbytes: int
    seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Received:
    """Blocks that a peer has pushed: verified, and the caller's from now on.

    Attributes:
        request: the name that the peer gave.
        blocks: ids in this cache, in the sender's order.
    """

    request: str
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Counters:
    """Running totals of an endpoint; `Stats` is what users read."""

    done: int = 0
    failed: int = 0
    in_doubt: int = 0
    blocks_sent: int = 0
    blocks_published: int = 0
    bytes_sent: int = 0
    bytes_published: int = 0
    checksum_errors: int = 0
    refused: int = 0
    late: int = 0
    seconds: float = 0.0
    seconds_hashing: float = 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """An endpoint at one moment.

    Attributes:
        done: transfers begun here that ended DONE.
        failed: that ended FAILED.
        in_doubt: that ended IN_DOUBT.
        blocks_sent: blocks of pushes that were DONE.
        blocks_published: blocks that were verified and given to a caller here.
        bytes_sent: bytes of `blocks_sent`.
        bytes_published: bytes of `blocks_published`.
        checksum_errors: blocks that arrived with other bytes than were sent.
        refused: transfers that a peer began and this side refused.
        late: transfers whose data or word came after their deadline here.
        seconds: of all transfers begun here that were DONE.
        seconds_hashing: of checksums, in a thread beside the transfers.
        free: blocks that are free now.
        in_use: blocks in use now.
        quarantined: blocks in quarantine now.
    """

    done: int
    failed: int
    in_doubt: int
    blocks_sent: int
    blocks_published: int
    bytes_sent: int
    bytes_published: int
    checksum_errors: int
    refused: int
    late: int
    seconds: float
    seconds_hashing: float
    free: int = field(kw_only=True)
    in_use: int = field(kw_only=True)
    quarantined: int = field(kw_only=True)

    def table(self) -> str:
        """The figures as lines of text, one a line."""
        rows = [(item.name.replace("_", " "), getattr(self, item.name)) for item in fields(self)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"{name:<{width}}  {value:>16,.3f}"
            if isinstance(value, float)
            else f"{name:<{width}}  {value:>16,}"
            for name, value in rows
        )
