# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: each rank holds some KV heads and the query heads that read them."""

from typing import TYPE_CHECKING, Any

from fastkv.contracts.numbers import is_integer
from fastkv.contracts.tensors import FLOAT, Checker, Rule
from fastkv.distributed import tensors
from fastkv.distributed.exchange import Exchange
from fastkv.distributed.groups import group_of
from fastkv.errors import SpecError

if TYPE_CHECKING:
    from fastkv.scales import StaticScales
    from fastkv.spec import CacheSpec


class TensorParallel:
    """A group whose ranks each hold a part of the heads, cut as `CacheSpec.shard` cuts the cache.

    Attention over a rank's heads is fastkv's ops with this rank's `spec`, and takes no message.

    Args:
        group: a process group of torch.distributed or paddle.distributed, or a `Group`.
        spec: the whole model's.
        num_query_heads: Hq of the whole model: a multiple of its Hkv and of the ranks.
        timeout: as in `group_of`.

    Raises:
        ContractError: as `group_of`.
        SpecError: the heads cannot be shared out so.

    Attributes:
        spec: this rank's.
        kv_heads: this rank's, counted in the whole model.
        query_heads: likewise; they read exactly `kv_heads`.
    """

    def __init__(
        self, group: Any, spec: "CacheSpec", num_query_heads: int, *, timeout: float | None = None
    ) -> None:
        self.group = group_of(group, timeout)
        rank, size = self.group.rank, self.group.size
        self.kv_heads = spec.kv_heads(rank, size)
        heads = spec.num_kv_heads
        if (
            not is_integer(num_query_heads)
            or num_query_heads < 1
            or any(num_query_heads % n for n in (heads, size))
        ):
            raise SpecError(
                "TensorParallel",
                "num_query_heads",
                expected=f"a multiple of the {heads} KV heads and of the {size} ranks",
                got=repr(num_query_heads),
            )
        share = num_query_heads // size
        self.query_heads = range(rank * share, (rank + 1) * share)
        self.num_query_heads = num_query_heads
        self.whole = spec
        self.spec = spec.shard(rank, size)
        self._exchange = Exchange(self.group)

    def columns(self) -> tuple[slice, slice, slice]:
        """Where this rank's Q, K and V are in qkv `[T, (Hq + 2*Hkv) * D]` of the whole model.

        They are likewise the rows of the projection's weight that this rank needs.
        """
        heads, dim = self.whole.num_kv_heads, self.whole.head_dim
        firsts = (0, self.num_query_heads, self.num_query_heads + heads)
        ranges = (self.query_heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            slice((first + own.start) * dim, (first + own.stop) * dim)
            for first, own in zip(firsts, ranges, strict=True)
        )
        return q, k, v

    def scales(self, static: "StaticScales") -> "StaticScales":
        """This rank's part of the whole model's static scales of a layer."""
        return static.shard(self.whole, self.group.rank, self.group.size)

    def all_gather(self, out: Any) -> Any:
        """The attention of all heads.

        An output projection that is cut along its input needs none of it: it multiplies `out` as
        it is, and sums over ranks.

        Args:
            out: `[T, Hq / R, D]` of this rank.

        Returns:
            `[T, Hq, D]` in the order of the model's heads, the same bits on every rank.

        Raises:
            ContractError: `out` has another shape or dtype.
            RankMismatchError: ranks have other T or dtypes; all raise it.
            CollectiveError: a rank is gone, or its message did not come in time.
        """
        share, dim = len(self.query_heads), self.whole.head_dim
        checker = Checker("TensorParallel.all_gather", D=dim)
        checker.sizes["Hq / R"] = share
        info = checker.tensor(Rule("out", ("T", "Hq / R", "D"), FLOAT), out)
        if self.group.size == 1:
            return out
        call = {"op": checker.op, "T": info.shape[0], "Hq": self.num_query_heads, "D": dim}
        parts = self._exchange.gather(call | {"dtype": info.dtype}, (out,))
        shape = (info.shape[0], self.num_query_heads, dim)
        whole = tensors.empty(info, shape, info.dtype)
        for rank, (part,) in enumerate(parts):
            whole[:, rank * share : (rank + 1) * share] = part
        return whole
