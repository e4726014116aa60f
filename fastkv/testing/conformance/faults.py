# SPDX-License-Identifier: Apache-2.0
"""What a backend did wrong, and the error that says so."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastkv.testing.conformance.cases import Case
from fastkv.testing.sentinels import SentinelTensor

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong tensor, or one op that was not called.

    Attributes:
        case: the case in which it happened.
        op: the op or kernel.
        argument: as the op calls it.
        expected: what should have arrived.
        got: what arrived instead.
    """

    case: Case
    op: str
    argument: str
    expected: str
    got: str

    def __str__(self) -> str:
        case = self.case
        around = "uniform list" if case.layout == "uniform" else "list of mixed formats"
        where = f"layer {case.layer_id} of {case.spec.num_layers}, {around}, {case.scenario}"
        return (
            f"{self.op}: {self.argument} (format {case.format}; {where}): "
            f"expected {self.expected}, got {self.got}"
        )


class ConformanceError(AssertionError):
    """A backend handed wrong tensors on.

    Args:
        faults: what it did wrong, in order.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        lines = [str(fault) for fault in self.faults[:_SHOWN]]
        if len(self.faults) > _SHOWN:
            lines.append(f"… and {len(self.faults) - _SHOWN} more")
        return "\n".join(lines)


def shown(value: object) -> str:
    """A value in a failure: a sentinel by its name, another tensor by its type."""
    if value is None or isinstance(value, SentinelTensor | bool | int | float | str | tuple):
        return repr(value)
    return type(value).__name__
