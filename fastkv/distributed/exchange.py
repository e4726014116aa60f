# SPDX-License-Identifier: Apache-2.0
"""One message a call between all ranks, and what finds ranks that make different calls.

Before the first message of a kind, ranks exchange what they are about to do: 512 bytes of text,
whatever the call, so that a disagreement is found where a message of the wrong size would hang. On
the CPU every message begins with 16 bytes as well: a digest of the call and a checksum of the
batch's lengths. On a GPU nobody could read them without waiting for the device.
"""

import json
from collections.abc import Sequence
from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv import arrays
from fastkv.arrays import ArrayInfo
from fastkv.distributed import tensors
from fastkv.distributed.groups import Group
from fastkv.dtypes import ITEMSIZE
from fastkv.errors import CollectiveError, RankMismatchError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Call = dict[str, Any]  # of strings, numbers, booleans and None, always in the same order

TEXT = 512
ALIGNED = 16  # bytes: what the kernels ask of a pointer
_DIGEST = 12


class Exchange:
    """The messages of one group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._known: dict[str, bytes] = {}

    def gather(self, call: Call, parts: Sequence[Any], lengths: int = 0) -> list[list[Any]]:
        """All ranks' tensors, in the order of ranks, by one message.

        Args:
            call: what this is; its `op` names it in errors. The same on all ranks.
            parts: tensors of one dtype, of the same shapes on all ranks.
            lengths: a checksum of what the ranks must agree on and no shape shows.

        Raises:
            RankMismatchError: the ranks make different calls.
            CollectiveError: a message did not arrive.
        """
        if self.group.size == 1:
            return [list(parts)]
        info = arrays.describe(parts[0])
        digest = self._agreed(call, info)
        head = digest + lengths.to_bytes(4, "little") if info.device == "cpu" else b""
        found = self._all_gather(call["op"], _pack(head, parts, info), blocking=False)
        if head:
            self._check_heads(call, head, [_head_of(message) for message in found])
        skip = len(head) // ITEMSIZE[info.dtype]
        return [_unpack(message, skip, parts) for message in found]

    def _agreed(self, call: Call, info: ArrayInfo) -> bytes:
        """The digest of a call that all ranks make; asks them once."""
        text = json.dumps(call)
        digest = self._known.get(text)
        if digest is None:
            message = arrays.from_host(_encode(text), info.library, info.device)
            found = self._all_gather(call["op"], message, blocking=True)
            self._check_calls(call, [_decode(each) for each in found])
            digest = self._known[text] = blake2b(text.encode(), digest_size=_DIGEST).digest()
        return digest

    def _all_gather(self, op: str, message: Any, *, blocking: bool) -> Sequence[Any]:
        try:
            return self.group.all_gather(message, blocking=blocking)
        except (RuntimeError, ValueError, OSError) as error:  # the libraries' own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CollectiveError(op, self.group.rank, self.group.size, reason) from error

    def _check_calls(self, call: Call, found: list[Call | None]) -> None:
        """Compare all ranks with the first, so that all raise the same."""
        first = found[0]
        for rank, other in enumerate(found):
            if other != first or other is None:
                raise self._mismatch(call, *_difference(first, other), rank)

    def _check_heads(self, call: Call, own: bytes, heads: list[bytes]) -> None:
        for rank, head in enumerate(heads):
            if head == own:
                continue
            same_call = head[:_DIGEST] == own[:_DIGEST]
            what = "other cu_seqlens_q or cache_seqlens" if same_call else "another call"
            raise self._mismatch(call, _spell(call), what, rank)

    def _mismatch(self, call: Call, expected: str, got: str, rank: int) -> RankMismatchError:
        return RankMismatchError(
            call["op"],
            f"the call of rank {rank}",
            format=call.get("format"),
            expected=expected,
            got=got,
            hint=f"This is rank {self.group.rank} of {self.group.size}.",
        )


def _difference(first: Call | None, other: Call | None) -> tuple[str, str]:
    """What differs, as expected and got."""
    if first is None or other is None:
        return "the text of a call", "another message: the ranks are at different steps"
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    wanted, came = ({name: call.get(name) for name in names} for call in (first, other))
    return f"{_spell(wanted)} as on rank 0", _spell(came)


def _spell(call: Call) -> str:
    return ", ".join(f"{name} = {value}" for name, value in call.items())


def _encode(text: str) -> "NDArray[np.int64]":
    raw = text.encode()
    assert len(raw) <= TEXT, "calls are short"
    return np.frombuffer(bytearray(raw.ljust(TEXT)), np.int64)


def _decode(message: Any) -> Call | None:
    raw = np.array(message.tolist(), np.int64).tobytes()
    try:
        call = json.loads(raw)
    except ValueError:
        return None
    return call if isinstance(call, dict) else None


def _pack(head: bytes, parts: Sequence[Any], info: ArrayInfo) -> Any:
    size = ITEMSIZE[info.dtype]
    length = len(head) // size + sum(prod(part.shape) for part in parts)
    step = ALIGNED // size
    message = tensors.empty(info, (max(1, -(-length // step)) * step,), info.dtype)
    at = len(head) // size
    if head:
        _bytes_of(message)[: len(head)] = np.frombuffer(head, np.uint8)
    for part in parts:
        count = prod(part.shape)
        message[at : at + count] = part.reshape([-1])
        at += count
    return message


def _unpack(message: Any, at: int, parts: Sequence[Any]) -> list[Any]:
    found = []
    for part in parts:
        count = prod(part.shape)
        found.append(message[at : at + count].reshape(list(part.shape)))
        at += count
    return found


def _bytes_of(message: Any) -> "NDArray[np.uint8]":
    return arrays.to_host(message).view(np.uint8)


def _head_of(message: Any) -> bytes:
    return _bytes_of(message)[: _DIGEST + 4].tobytes()
