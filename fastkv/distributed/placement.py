# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which tokens of a context.

Pages go around: page m of a request, tokens m * P to (m + 1) * P - 1, is on rank m % R. So ranks
hold equally much at every length, to within a page, and a token never moves as its context grows;
runs of neighbouring pages would need the final length for that. A rank's tokens keep their order
and fill its pages without gaps, since only a request's last page is ever partly full: locally
they are a context like any other.
"""

from dataclasses import dataclass
from typing import Any

from fastkv.contracts.numbers import is_integer
from fastkv.errors import SpecError


@dataclass(frozen=True, slots=True)
class Placement:
    """One rank's share of every context.

    Attributes:
        rank: 0 to size - 1.
        size: R.
        page_size: P.

    Raises:
        SpecError: a number that is out of range.
    """

    rank: int
    size: int
    page_size: int

    def __post_init__(self) -> None:
        for name, least, below in (("size", 1, None), ("page_size", 1, None), ("rank", 0, "size")):
            value = getattr(self, name)
            most = None if below is None else self.size - 1
            if is_integer(value) and value >= least and (most is None or value <= most):
                continue
            expected = f"an integer of at least {least}" if most is None else f"0 to {most}"
            raise SpecError("Placement", name, expected=expected, got=repr(value))

    def keys(self, tokens: Any) -> Any:
        """How many of a context's first `tokens` tokens this rank holds.

        Grows by one with every token of this rank and with no other, so it also maps a position
        to the number of this rank's keys before it.

        Args:
            tokens: int32, any shape and array library; at least 0. Arithmetic on its device:
                nothing is read back.
        """
        around, page = self.page_size * self.size, self.page_size
        rest = tokens % around - self.rank * page
        return tokens // around * page + rest.clip(0, page)

    def num_pages(self, tokens: int) -> int:
        """Pages of this rank's pool that a context of `tokens` tokens takes; a host integer."""
        pages = -(-tokens // self.page_size)
        return max(0, -(-(pages - self.rank) // self.size))
