# SPDX-License-Identifier: Apache-2.0
"""Groups of torch.distributed: gloo, NCCL, and what else gathers into one tensor."""

import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# The second is the first's name before PyTorch 2.13.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class TorchGroup:
    """A `Group` over a ProcessGroup.

    Refers to it weakly: it is torch's until `destroy_process_group`, which joins its threads only
    where nobody else holds it. Threads that outlive it end the process with an abort where they
    come to drop a tensor while the interpreter goes down.
    """

    def __init__(self, group: Any, timeout: float | None) -> None:
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group) if self.rank >= 0 else 0
        self._group = weakref.ref(group)
        self._timeout = None if timeout is None else timedelta(seconds=timeout)

    def all_gather(self, message: Any, *, blocking: bool) -> Sequence[Any]:
        """See `Group`."""
        if (group := self._group()) is None:
            raise RuntimeError("the process group was destroyed")
        gathered = torch.empty(
            self.size * message.numel(), dtype=message.dtype, device=message.device
        )
        work = _gather(gathered, message, group=group, async_op=True)
        # On NCCL, a wait with a timeout blocks the host, and one without only the stream; there
        # the group's watchdog keeps the time.
        if self._timeout is not None and (blocking or message.device.type == "cpu"):
            work.wait(self._timeout)
        else:
            work.wait()
        parts: Sequence[Any] = gathered.view(self.size, -1).unbind(0)
        return parts


adapt = TorchGroup
