# SPDX-License-Identifier: Apache-2.0
"""The caller's process group, of whichever library, as the one collective that is needed."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from fastkv.contracts.numbers import is_finite
from fastkv.errors import ContractError, DtypeError

_LIBRARIES = ("torch", "paddle")


@runtime_checkable
class Group(Protocol):
    """What the collectives here ask of a group; a communicator of one's own may have it too.

    Attributes:
        rank: of this process, 0 to size - 1.
        size: number of ranks.
    """

    rank: int
    size: int

    def all_gather(self, message: Any, *, blocking: bool) -> Sequence[Any]:
        """The messages of all ranks, in the order of ranks.

        Args:
            message: `[n]`, dense, of the same n and dtype on every rank.
            blocking: the host waits for the messages too, no longer than the timeout. Otherwise
                it is enough that what is launched later on the current stream comes after them.
        """


def group_of(group: Any, timeout: float | None = None) -> Group:
    """A `Group` over a process group of torch.distributed or paddle.distributed.

    Args:
        group: theirs (`torch.distributed.group.WORLD`, say), or a `Group`, which is returned.
        timeout: seconds that the host waits for a message; None: the group's own. A wait on a
            GPU's stream is not the host's and always has the group's own.

    Raises:
        DtypeError: it is neither.
        ContractError: this process is no member, or the timeout is no number above 0.
    """
    if timeout is not None and not (is_finite(timeout) and timeout > 0):
        raise ContractError(
            "group_of", "timeout", expected="None or seconds above 0", got=repr(timeout)
        )
    roots = {base.__module__.partition(".")[0] for base in type(group).__mro__}
    for library in _LIBRARIES:
        if library in roots:
            found: Group = import_module(f"fastkv.distributed.{library}").adapt(group, timeout)
            return _member(found)
    if isinstance(group, Group):
        return _member(group)
    raise DtypeError(
        "group_of",
        "group",
        expected="a process group of torch.distributed or paddle.distributed that this process "
        "belongs to, or a Group",
        got=type(group).__qualname__,
    )


def _member(group: Group) -> Group:
    if not 0 <= group.rank < group.size:
        raise ContractError(
            "group_of",
            "group",
            expected="a group that this process belongs to",
            got=f"rank {group.rank} of {group.size}",
        )
    return group
