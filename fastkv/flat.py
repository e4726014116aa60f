# SPDX-License-Identifier: Apache-2.0
"""What a frozen bundle of tensors keeps of itself, so that it is taken apart once."""

from typing import Any


class Flat:
    """Base of the frozen bundles of tensors that ops take.

    Attributes:
        _flat: a hashable of all that is no tensor, with a mark for each; and the tensors in order.
            `fastkv.contracts.remember` leaves it there. It is no dataclass field: nothing compares,
            shows, replaces or pickles it, and a copy has none.
    """

    __slots__ = ("_flat",)

    _flat: tuple[Any, tuple[Any, ...]]
