# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: each rank attends over its pages of a context, then all merge."""

from typing import TYPE_CHECKING, Any
from zlib import crc32

from fastkv import arrays, ops
from fastkv.contracts import calls
from fastkv.contracts.tensors import INT32, Checker, Rule
from fastkv.distributed import tensors
from fastkv.distributed.exchange import Call, Exchange
from fastkv.distributed.groups import group_of
from fastkv.distributed.local import Local
from fastkv.distributed.placement import Placement
from fastkv.errors import BatchValueError, SpecMismatchError

if TYPE_CHECKING:
    from fastkv.cache import LayerCache

_RULES = (
    Rule("cu_seqlens_q", ("B+1",), INT32),
    Rule("cache_seqlens", ("B",), INT32),
    Rule("block_table", ("B", "M"), INT32),
)


class ContextParallel:
    """A group whose ranks each hold every R-th page of a context; see `Placement`.

    Every rank has all query heads (of its tensor-parallel rank, if there is such a group too) and
    is called with the same batch.

    Args:
        group: a process group of torch.distributed or paddle.distributed, or a `Group`.
        page_size: P of the cache.
        timeout: as in `group_of`.

    Raises:
        ContractError: as `group_of`.

    Attributes:
        placement: which tokens this rank holds.
    """

    def __init__(self, group: Any, page_size: int, *, timeout: float | None = None) -> None:
        self.group = group_of(group, timeout)
        self.placement = Placement(self.group.rank, self.group.size, page_size)
        self.exchange = Exchange(self.group)

    def step(
        self, *, cu_seqlens_q: Any, cache_seqlens: Any, block_table: Any, mask_offsets: Any = None
    ) -> "Step":
        """One step's batch, for all of its layers.

        All arguments are of the whole context, and the same on every rank, as for one GPU. What a
        rank makes of them is arithmetic on their device.

        Args:
            cu_seqlens_q: int32 `[B+1]`, from 0; a captured batch may have rows behind its last.
            cache_seqlens: int32 `[B]`, tokens cached before this step, on all ranks together.
            block_table: int32 `[B, M]`; entry m is a page of rank `m % R`'s pool, -1 where unused.
            mask_offsets: int32 `[T, 2]`, in keys of the whole context; or None.

        Raises:
            ContractError: a tensor of a wrong shape, dtype, library or device; on the CPU also a
                `cu_seqlens_q` that does not begin with 0.
        """
        return Step(self, cu_seqlens_q, cache_seqlens, block_table, mask_offsets)


class Step:
    """One step's batch on one rank; `ContextParallel.step` makes it.

    A layer first writes, then attends, with the options of the ops of the same names.
    """

    def __init__(self, context: ContextParallel, sums: Any, cached: Any, table: Any, mask: Any):
        checker = Checker("ContextParallel.step")
        infos = [
            checker.tensor(rule, array)
            for rule, array in zip(_RULES, (sums, cached, table), strict=True)
        ]
        self._context = context
        self._batch = (sums, cached, table)
        self._mask = mask
        self._local = Local(context.placement, *self._batch, mask, infos)
        self._lengths: Call = {}
        if infos[0].device == "cpu":
            self._lengths = {"checksum of the lengths": _checksum(sums, cached)}

    def rope_write_kv(self, qkv: Any, cache: "LayerCache", **options: Any) -> Any:
        """Write those of the new tokens' K and V that are this rank's, and return all rotated Q.

        Args:
            qkv: `[T, (Hq + 2*Hkv) * D]`, all new tokens.
            cache: this rank's pool of pages; written.
            options: of `fastkv.ops.rope_write_kv`, `rope` for instance.

        Returns:
            As `fastkv.ops.rope_write_kv`.

        Raises:
            ContractError: as `fastkv.ops.rope_write_kv`.
        """
        self._require_page_size("rope_write_kv", cache)
        return ops.rope_write_kv(qkv, cache, **self._local.written, **options)

    def paged_attention(
        self,
        q: Any,
        cache: "LayerCache",
        *,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Any = None,
        return_lse: bool = False,
    ) -> Any:
        """`fastkv.ops.paged_attention` over the whole context, the same bits on every rank.

        Each rank attends over its keys in float32 (the products in the number type of the format),
        ranks exchange `[T, Hq, D]` outputs and `[T, Hq]` LSEs in one message of
        `4 * (D + 1) * Hq` bytes a row, and each merges them in the order of ranks:
        `merge_states`' formula, R - 1 times. The sinks join last, as one more state with
        lse = sink and out = 0: `out / (1 + exp(sink - lse))`.

        Args:
            q: `[T, Hq, D]`, the same on every rank, rotated.
            cache: this rank's pool of pages.
            scale: as of the op, like all that follow; the same on every rank.
            causal: see there.
            window: see there; in tokens of the whole context.
            soft_cap: see there.
            sinks: float32 `[Hq]`.
            return_lse: also return the LSE of the whole context, without sinks.

        Returns:
            `out [T, Hq, D]` in q's dtype; with `return_lse`, `(out, lse)`.

        Raises:
            ContractError: as the op. The ranks that did not raise wait for this one, until the
                deadline.
            RankMismatchError: the ranks make different calls; all raise it.
            CollectiveError: a rank is gone, or its message did not come in time.
        """
        self._require_page_size("paged_attention", cache)
        options = (scale, window, soft_cap, sinks)
        checked = calls.paged_attention(q, cache, *self._batch, self._mask, *options, None)
        sizes, info = checked.sizes, arrays.describe(q)
        self._local.check_values("paged_attention", cache, sizes["T"])
        out, lse = ops.paged_attention(
            tensors.cast(q, info, "float32"),
            cache,
            **self._local.read(sizes["T"]),
            mask_offsets=self._local.intervals(sizes["T"], causal, window),
            causal=False,
            scale=scale,
            soft_cap=soft_cap,
            return_lse=True,
        )
        call = _call(cache, sizes, info.dtype, (causal, window, scale, soft_cap), sinks, self._mask)
        states = self._context.exchange.gather(call | self._lengths, (out, lse))
        out, lse = states[0]
        for state in states[1:]:
            out, lse = ops.merge_states(out, lse, *state)
        merged = out if sinks is None else _with_sinks(out, lse, sinks)
        merged = tensors.cast(merged, info._replace(dtype="float32"), info.dtype)
        return (merged, lse) if return_lse else merged

    def _require_page_size(self, op: str, cache: "LayerCache") -> None:
        wanted, got = self._context.placement.page_size, cache.spec.page_size
        if wanted != got:
            raise SpecMismatchError(
                op,
                "cache.spec.page_size",
                format=cache.quant.name.value,
                expected=f"{wanted}, as of the ContextParallel",
                got=str(got),
            )


def _with_sinks(out: Any, lse: Any, sinks: Any) -> Any:
    info = arrays.describe(out)
    nothing = arrays.zeros_like(info, info.shape, "float32")
    spread = arrays.zeros_like(info, info.shape[:2], "float32") + sinks
    return ops.merge_states(out, lse, nothing, spread)[0]


def _call(
    cache: "LayerCache", sizes: dict[str, int], dtype: str, options: Any, sinks: Any, mask: Any
) -> Call:
    """What all ranks must do alike."""
    spec = cache.spec
    call: Call = {"op": "paged_attention"}
    call |= {name: sizes[name] for name in ("B", "M", "T", "Hq", "Hkv", "D", "P")}
    call |= {"layer": cache.layer_id, "format": cache.quant.name.value}
    call |= {"cache": spec.storage_dtype(cache.layer_id), "scales": spec.scale_dtype, "q": dtype}
    names = ("causal", "window", "scale", "soft_cap")
    plain = (x if x is None or isinstance(x, bool) else float(x) for x in options)
    call |= dict(zip(names, plain, strict=True))
    return call | {"sinks": sinks is not None, "mask_offsets": mask is not None}


def _checksum(sums: Any, cached: Any) -> int:
    """Of the lengths, which must be the same on every rank; on the CPU."""
    sums, cached = arrays.to_host(sums), arrays.to_host(cached)
    if sums[0] != 0:
        raise BatchValueError(
            "ContextParallel.step", "cu_seqlens_q[0]", expected="0", got=str(sums[0])
        )
    return crc32(cached.tobytes(), crc32(sums.tobytes()))
