# SPDX-License-Identifier: Apache-2.0
"""How many tokens and requests fit in a GPU's memory, for each format of the cache."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastkv.engine_config import ModelConfig
from fastkv.errors import FastKVError, SpecError
from fastkv.quant import QuantType, quant_spec
from fastkv.spec import CacheSpec

GIB = 2**30
CONTEXTS = (4096, 32768, 131072)
_MOST = 2**60


class CapacityError(FastKVError, ValueError):
    """The memory holds no cache at all; says what takes it."""


def _require_between(least: int, value: object, op: str, name: str, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise SpecError(op, name, expected=f"{least} to {_MOST} {unit}", got=repr(value))


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one rank.

    Attributes:
        gpu: bytes of one GPU.
        weights: bytes of the whole model's weights; each rank holds `1 / tp` of them.
        utilization: share of the GPU that weights and cache may take; the rest is for activations,
            CUDA graphs and the libraries.
    """

    gpu: int
    weights: int
    utilization: float = 0.9

    def __post_init__(self) -> None:
        _require_between(1, self.gpu, "Memory", "gpu", "bytes")
        _require_between(0, self.weights, "Memory", "weights", "bytes")
        if not 0 < self.utilization <= 1:
            raise SpecError(
                "Memory", "utilization", expected="above 0, at most 1", got=str(self.utilization)
            )

    def for_cache(self, tp: int) -> int:
        """Bytes that one of `tp` ranks has for its cache; raises `CapacityError` if none."""
        usable, weights = math.floor(self.gpu * self.utilization), -(-self.weights // tp)
        if usable <= weights:
            raise CapacityError(
                f"no memory for a cache: the weights take {weights / GIB:.2f} GiB a rank, and "
                f"{self.gpu / GIB:.2f} GiB x {self.utilization:g} is {usable / GIB:.2f} GiB"
            )
        return usable - weights


@dataclass(frozen=True, slots=True)
class Row:
    """One format's bytes and capacity, on one rank.

    Attributes:
        format: its name.
        configured: whether the model's config asks for it.
        bytes_per_token: K, V and paged scales of one more token, in the layers that see all tokens.
        static_bytes: static multipliers and zero points, once.
        compression: bytes that a token takes in a bf16 cache over those here.
        request_bytes: for each context, the bytes of the pages that one request takes.
        pages: pages of the longest request that fits, in the layers that see all tokens; without
            windows that is all pages of the cache. None without a memory, or if no limit.
        tokens: what they hold.
        requests: for each context, how many fit at once; None without a memory.
    """

    format: str
    configured: bool
    bytes_per_token: int
    static_bytes: int
    compression: float
    request_bytes: dict[int, int]
    pages: int | None
    tokens: int | None
    requests: dict[int, int] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows, and what a reader of them should know.

    Attributes:
        rows: one a format.
        cache_bytes: what one rank has for its cache; None without a memory.
        notes: sentences.
    """

    rows: tuple[Row, ...]
    cache_bytes: int | None
    notes: tuple[str, ...]


def plan(
    model: ModelConfig,
    *,
    memory: Memory | None = None,
    page_size: int = 64,
    tp: int = 1,
    contexts: Sequence[int] = CONTEXTS,
    formats: Iterable[QuantType | str] = tuple(QuantType),
    scale_dtype: str = "float32",
    windowed: bool = False,
) -> Plan:
    """Bytes and capacity of a model's cache in each format, on one tensor-parallel rank.

    A request of n tokens takes `ceil(n / page_size)` whole pages. With more ranks than KV heads,
    heads are replicated. All ranks hold the same tokens, so one rank's count is the model's.

    Args:
        model: the shape, from `read_config` or by hand.
        memory: of one rank; None counts bytes only.
        page_size: P.
        tp: ranks of the tensor-parallel group.
        contexts: lengths of requests, in tokens.
        formats: which formats.
        scale_dtype: dtype of the paged scales of dynamic formats.
        windowed: layers with a window hold only the pages that it reaches, as in an engine with a
            block table for each kind of layer. Else they hold every token: fastkv's batches have
            one block table for all layers.

    Raises:
        SpecError: a value that no cache can have.
        UnknownNameError: a format that nobody knows.
        CapacityError: the memory holds no cache.
    """
    for context in contexts:
        _require_between(1, context, "plan", "contexts", "tokens")
    names = [quant_spec(name, op="plan", argument="formats").name for name in formats]
    model.spec(page_size, QuantType.NONE).kv_heads(0, tp)  # refuses what no format can have
    budget = None if memory is None else memory.for_cache(tp)
    notes = [*model.notes, *_notes(model, tp, windowed)]
    rows: list[Row] = []
    refused: list[SpecError] = []
    for name in dict.fromkeys(names):
        try:
            spec = model.spec(page_size, name, scale_dtype).shard(0, tp)
        except SpecError as error:
            if error.format is None:
                raise
            refused.append(error)
            notes.append(f"{name} is left out: {error.argument}: expected {error.expected}.")
        else:
            rows.append(_row(model, spec, budget, contexts, windowed))
    if refused and not rows:
        raise refused[0]
    if budget is not None and rows and all(row.pages == 0 for row in rows):
        raise CapacityError(
            f"no memory for a cache: {budget} bytes a rank are left, less than one page of "
            f"{page_size} tokens"
        )
    return Plan(tuple(rows), budget, tuple(notes))


def _notes(model: ModelConfig, tp: int, windowed: bool) -> list[str]:
    notes = []
    windows = sorted({window for window in model.windows if window is not None})
    if windows:
        count = sum(window is not None for window in model.windows)
        sizes = " or ".join(map(str, windows))
        how = "hold only its pages" if windowed else "are counted in full"
        notes.append(f"{count} of {model.num_layers} layers see {sizes} tokens and {how}.")
    if tp > model.num_kv_heads:
        notes.append(f"Each KV head is on {tp // model.num_kv_heads} of the {tp} ranks.")
    return notes


def _row(
    model: ModelConfig,
    spec: CacheSpec,
    budget: int | None,
    contexts: Sequence[int],
    windowed: bool,
) -> Row:
    configured = spec.quant == model.quant
    pages = _Pages(spec, model.windows if windowed else ())
    static = spec.static_bytes(model.granularity if configured else None)
    bf16 = replace(spec, quant=QuantType.NONE, dtype="bfloat16")
    request_bytes = {n: pages.nbytes(-(-n // spec.page_size)) for n in contexts}
    longest, requests = None, None
    if budget is not None:
        left = max(budget - static, 0)
        longest = pages.longest(left)
        requests = {n: left // size for n, size in request_bytes.items()}
    return Row(
        format=str(spec.quant),
        configured=configured,
        bytes_per_token=pages.growth // spec.page_size,
        static_bytes=static,
        compression=bf16.bytes_per_token() / spec.bytes_per_token(),
        request_bytes=request_bytes,
        pages=longest,
        tokens=None if longest is None else longest * spec.page_size,
        requests=requests,
    )


class _Pages:
    """Bytes of a request's pages, where some layers hold no more than their window reaches."""

    def __init__(self, spec: CacheSpec, windows: Sequence[int | None]) -> None:
        self._layer = sum(tensor.nbytes for tensor in spec.layer_tensors(0, 1))  # of one page
        # A window of W tokens that ends anywhere in a page reaches this many pages.
        reach = [None if w is None else -(-(w - 1) // spec.page_size) + 1 for w in windows]
        self._layers = Counter(reach or [None] * spec.num_layers)
        self.growth = self._layer * self._layers[None]

    def nbytes(self, pages: int) -> int:
        """Bytes of a request of `pages` pages, in all layers."""
        held = (n * (pages if r is None else min(pages, r)) for r, n in self._layers.items())
        return self._layer * sum(held)

    def longest(self, budget: int) -> int | None:
        """Pages of the longest request that fits; None if it may grow without limit."""
        most = budget // self.growth if self.growth else max(r for r in self._layers if r)
        if not self.growth and self.nbytes(most) <= budget:
            return None
        return bisect_right(range(1, most + 1), budget, key=self.nbytes)
