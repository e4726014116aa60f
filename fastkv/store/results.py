# SPDX-License-Identifier: Apache-2.0
"""What a call of a store comes back with."""

from dataclasses import dataclass

from fastkv.store.counters import Reason


@dataclass(frozen=True, slots=True)
class PageResults:
    """What became of each page of a call, in order.

    Attributes:
        reasons: None of a page that was filled (`get`) or kept (`put`), else why it was not.
    """

    reasons: tuple[Reason | None, ...]

    @property
    def done(self) -> tuple[bool, ...]:
        """Of each page, whether it was filled or kept."""
        return tuple(reason is None for reason in self.reasons)

    @property
    def leading(self) -> int:
        """How many pages from the first on, without a gap: the prefix that can be used."""
        gaps = (i for i, reason in enumerate(self.reasons) if reason is not None)
        return next(gaps, len(self.reasons))
