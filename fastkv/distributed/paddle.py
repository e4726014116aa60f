# SPDX-License-Identifier: Apache-2.0
"""Groups of paddle.distributed."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import paddle.distributed as dist


class PaddleGroup:
    """A `Group` over a paddle.distributed Group."""

    def __init__(self, group: Any, timeout: float | None) -> None:
        self.rank: int = group.rank
        self.size: int = group.nranks
        self._group = group
        self._timeout = None if timeout is None else timedelta(seconds=timeout)

    def all_gather(self, message: Any, *, blocking: bool) -> Sequence[Any]:
        """See `Group`."""
        parts: list[Any] = []  # of one tensor for all, Paddle's gloo knows nothing
        task = dist.all_gather(parts, message, group=self._group, sync_op=False)
        if self._timeout is not None and (blocking or message.place.is_cpu_place()):
            task.wait(self._timeout)
        else:
            task.wait()
        return parts


adapt = PaddleGroup
