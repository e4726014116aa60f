# SPDX-License-Identifier: Apache-2.0
"""One message a call between all ranks, and what finds ranks that make different calls.

Messages of different sizes hang, or end the process. So ranks first compare 16 bytes, whatever the
call: a digest of it, on the CPU with the batch's lengths in it. Where they differ, the ranks
exchange the calls as text, say what differs and send no more. On the CPU they compare before every
message, on a GPU once a kind of call, as the host waits for it.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from math import prod
from typing import Any

from fastkv import arrays
from fastkv.arrays import ArrayInfo
from fastkv.distributed import tensors
from fastkv.distributed.groups import Group
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import CollectiveError, RankMismatchError

Call = dict[str, Any]  # of strings, numbers, booleans and None, always in the same order

TEXT = 512
ALIGNED = 16  # bytes: what the kernels ask of a pointer
_DIGEST = 16


class Exchange:
    """The messages of one group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._known: set[str] = set()

    def gather(self, call: Call, parts: Sequence[Any]) -> list[list[Any]]:
        """All ranks' tensors, in the order of ranks, by one message.

        Args:
            call: what this is; its `op` names it in errors. The same on all ranks.
            parts: tensors of one dtype, of the same shapes on all ranks.

        Raises:
            RankMismatchError: the ranks make different calls.
            CollectiveError: a message did not arrive.
        """
        if self.group.size == 1:
            return [list(parts)]
        info = arrays.describe(parts[0])
        self._agree(call, info)
        found = self._all_gather(call["op"], _pack(parts, info), blocking=False)
        return [_unpack(message, parts) for message in found]

    def _agree(self, call: Call, info: ArrayInfo) -> None:
        text = json.dumps(call)
        if text in self._known:
            return
        digest = blake2b(text.encode(), digest_size=_DIGEST).digest()
        if len(set(self._all_bytes(call["op"], digest, info))) > 1:
            raw = self._all_bytes(call["op"], text.encode().ljust(TEXT), info)
            raise self._mismatch([json.loads(each) for each in raw])
        if info.device != "cpu":
            self._known.add(text)

    def _all_bytes(self, op: str, raw: bytes, info: ArrayInfo) -> list[bytes]:
        """All ranks' bytes, on the host; as int64, which every library's groups take."""
        import numpy as np  # a policy that sends nothing needs no array library

        assert len(raw) in (_DIGEST, TEXT), "the size says nothing of the call"
        words = np.frombuffer(bytearray(raw), np.int64)
        message = arrays.from_host(words, info.library, info.device)
        found = self._all_gather(op, message, blocking=True)
        return [np.array(each.tolist(), np.int64).tobytes() for each in found]

    def _all_gather(self, op: str, message: Any, *, blocking: bool) -> Sequence[Any]:
        try:
            return self.group.all_gather(message, blocking=blocking)
        except (RuntimeError, ValueError, OSError) as error:  # the libraries' own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CollectiveError(op, self.group.rank, self.group.size, reason) from error

    def _mismatch(self, found: list[Call]) -> RankMismatchError:
        """Compares all ranks with the first, so that all raise the same."""
        rank, other = next((r, call) for r, call in enumerate(found) if call != found[0])
        names = [name for name in {**found[0], **other} if found[0].get(name) != other.get(name)]
        wanted, came = (
            ", ".join(f"{name} = {call.get(name)}" for name in names) for call in (found[0], other)
        )
        return RankMismatchError(
            found[0]["op"],
            f"the call of rank {rank}",
            format=found[0].get("format"),
            expected=f"{wanted} as on rank 0",
            got=came,
            hint=f"This is rank {self.group.rank} of {self.group.size}.",
        )


def _pack(parts: Sequence[Any], info: ArrayInfo) -> Any:
    length, step = sum(prod(part.shape) for part in parts), ALIGNED // ITEMSIZE[info.dtype]
    message = tensors.empty(info, (max(1, -(-length // step)) * step,), info.dtype)
    at = 0
    for part in parts:
        count = prod(part.shape)
        message[at : at + count] = part.reshape([-1])
        at += count
    return message


def _unpack(message: Any, parts: Sequence[Any]) -> list[Any]:
    found, at = [], 0
    for part in parts:
        count = prod(part.shape)
        found.append(message[at : at + count].reshape(list(part.shape)))
        at += count
    return found
