# SPDX-License-Identifier: Apache-2.0
"""Mixtures of requests that a step may serve, and batches of sentinels for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastkv.batch import BatchMeta
from fastkv.errors import unknown_name
from fastkv.rope import Rope
from fastkv.spec import CacheSpec
from fastkv.testing.sentinels import SentinelTensor

_MAX_POSITIONS = 4096


@dataclass(frozen=True, slots=True)
class Scenario:
    """The requests of one step.

    Attributes:
        name: what failures call it.
        new_tokens: new tokens of each request.
        cached: tokens of each request that are in the cache already.
        num_decode: how many of the requests, from the first, are decode or draft rows.
    """

    name: str
    new_tokens: tuple[int, ...]
    cached: tuple[int, ...]
    num_decode: int

    @property
    def num_requests(self) -> int:
        """B."""
        return len(self.new_tokens)

    @property
    def total_k(self) -> int:
        """Rows of gathered K and V: cached and new tokens of the prefill requests."""
        lengths = [a + b for a, b in zip(self.new_tokens, self.cached, strict=True)]
        return sum(lengths[self.num_decode :])

    def __str__(self) -> str:
        return self.name


_ROWS = (
    Scenario("decode only", new_tokens=(1, 2, 1), cached=(5, 9, 3), num_decode=3),
    Scenario("prefill", new_tokens=(4, 7), cached=(0, 0), num_decode=0),
    Scenario("prefill over a prefix", new_tokens=(4, 6), cached=(8, 3), num_decode=0),
    Scenario("mixed", new_tokens=(1, 3, 5, 4), cached=(6, 2, 0, 7), num_decode=2),
)
#: The scenarios of the conformance suite, by name.
SCENARIOS: Mapping[str, Scenario] = MappingProxyType({row.name: row for row in _ROWS})


def scenario_named(scenario: Scenario | str, *, op: str) -> Scenario:
    """A scenario, or the one of that name."""
    if isinstance(scenario, Scenario):
        return scenario
    if scenario not in SCENARIOS:
        raise unknown_name(op, "scenario", scenario, SCENARIOS)
    return SCENARIOS[scenario]


def sentinel_meta(
    spec: CacheSpec, caches: Sequence[Any], scenario: Scenario | str = "mixed", **changes: Any
) -> BatchMeta:
    """A batch of sentinels: only `num_decode`, `total_k` and shapes hold numbers.

    Args:
        spec: what `caches` holds.
        caches: the flat cache list, from `sentinel_caches` say.
        scenario: a `Scenario`, or the name of one in `SCENARIOS`.
        changes: fields of `BatchMeta` in place of these.
    """
    step = scenario_named(scenario, op="sentinel_meta")
    requests = step.num_requests
    longest = max((a + b for a, b in zip(step.new_tokens, step.cached, strict=True)), default=0)
    pages = -(-longest // spec.page_size)
    table = (_MAX_POSITIONS, spec.head_dim // 2)
    values: dict[str, Any] = {
        "cu_seqlens_q": SentinelTensor("cu_seqlens_q", (requests + 1,), "int32"),
        "cache_seqlens": SentinelTensor("cache_seqlens", (requests,), "int32"),
        "block_table": SentinelTensor("block_table", (requests, pages), "int32"),
        "cu_seqlens_k": SentinelTensor("cu_seqlens_k", (requests + 1,), "int32"),
        "total_k": step.total_k,
        "num_decode": step.num_decode,
        "rope": Rope(
            SentinelTensor("rope.cos", table, "float32"),
            SentinelTensor("rope.sin", table, "float32"),
        ),
    }
    return BatchMeta(caches=caches, spec=spec, **(values | changes))


def sentinel_qkv(
    spec: CacheSpec, scenario: Scenario | str = "mixed", group: int = 3
) -> SentinelTensor:
    """The new tokens' `[T, (Hq + 2*Hkv) * D]`, with `group` query heads for each KV head."""
    step = scenario_named(scenario, op="sentinel_qkv")
    width = (group + 2) * spec.num_kv_heads * spec.head_dim
    return SentinelTensor("qkv", (sum(step.new_tokens), width), spec.dtype)
