# SPDX-License-Identifier: Apache-2.0
"""Attention over several ranks: KV heads shared out, or each request's context.

`TensorParallel` cuts a model along its KV heads, `ContextParallel` a request along its pages. Both
work on the caller's process group, of torch.distributed or paddle.distributed, and import neither
library themselves.
"""

from fastkv.distributed.context import ContextParallel, Step
from fastkv.distributed.groups import Group, group_of
from fastkv.distributed.heads import TensorParallel
from fastkv.distributed.placement import Placement

__all__ = ["ContextParallel", "Group", "Placement", "Step", "TensorParallel", "group_of"]
