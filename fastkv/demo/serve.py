# SPDX-License-Identifier: Apache-2.0
"""Serve the sample step by step through one backend and one format."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.backends import Ops, get_backend
from fastkv.batch import BatchMeta
from fastkv.demo.sample import Sample
from fastkv.demo.schedule import PAGE_SIZE, Request, Step, requests, steps
from fastkv.quant import QuantSpec
from fastkv.rope import Rope
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DemoLayer:
    """What an engine's attention layer would carry."""

    layer_id: int
    cache_quant_type_str: str
    static_scales: StaticScales | None


def demo_spec(sample: Sample, quant: QuantSpec) -> CacheSpec:
    """The cache of the sample's layers in one format, `none` in bfloat16."""
    layers = len(sample.layers)
    return CacheSpec(layers, sample.num_kv_heads, sample.head_dim, PAGE_SIZE, quant.name)


def demo_layers(sample: Sample, spec: CacheSpec) -> tuple[DemoLayer, ...]:
    """The layers, with static scales calibrated on text other than the sample's."""
    return tuple(
        DemoLayer(i, spec.layer_quant(i).name.value, _scales(sample, spec, i))
        for i in range(spec.num_layers)
    )


def _scales(sample: Sample, spec: CacheSpec, layer_id: int) -> StaticScales | None:
    quant = spec.layer_quant(layer_id)
    if not quant.needs_static:
        return None
    layer = sample.layers[layer_id]
    ranges = (layer.k_min, layer.k_max, layer.v_min, layer.v_max)
    scales = StaticScales.from_minmax(*ranges, quant.name)
    scales.validate(spec, layer_id)
    return scales


def serve(
    sample: Sample, spec: CacheSpec, backend_name: str, ops: Ops | None = None
) -> "list[list[F32]]":
    """The attention output of every token: `[layer][request]`, each `[L, Hq, D]`.

    Args:
        sample: the data.
        spec: see `demo_spec`.
        backend_name: the backend to drive.
        ops: None takes `fastkv.ops`.
    """
    backend = get_backend(spec, name=backend_name, ops=ops)
    layers, rope, batch = demo_layers(sample, spec), sample.rope(), requests(sample)
    block_table = _pages(batch)
    caches = spec.allocate(int(block_table.max()) + 1)
    heads = (sample.num_q_heads, sample.head_dim)
    outs = [[np.zeros((len(r.tokens), *heads), np.float32) for r in batch] for _ in layers]
    for step in steps(batch):
        meta = _meta(step, block_table, caches, spec, rope)
        rows = _sample_rows(step, batch)
        for layer, per_request in zip(layers, outs, strict=True):
            qkv = sample.layers[layer.layer_id].qkv[rows]
            out = backend.forward_mixed(qkv, layer, meta)
            _collect(out, step, per_request)
    return outs


def _pages(batch: tuple[Request, ...]) -> "NDArray[np.int32]":
    """A block table with shuffled pages, -1 where unused."""
    counts = [-(-len(request.tokens) // PAGE_SIZE) for request in batch]
    ids = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
    table = np.full((len(batch), max(counts)), -1, np.int32)
    for row, count, end in zip(table, counts, np.cumsum(counts), strict=True):
        row[:count] = ids[end - count : end]
    return table


def _meta(
    step: Step, block_table: "NDArray[np.int32]", caches: list[Any], spec: CacheSpec, rope: Rope
) -> BatchMeta:
    cached, new = np.array(step.cached, np.int32), np.array(step.new, np.int32)
    # Decode requests read their pages in place: they get no rows of gathered K and V.
    gathered = np.where(np.arange(len(new)) < step.num_decode, 0, cached + new)
    return BatchMeta(
        caches,
        spec,
        cu_seqlens_q=_running_sum(new),
        cache_seqlens=cached,
        block_table=block_table[list(step.order)],
        cu_seqlens_k=_running_sum(gathered),
        total_k=int(gathered.sum()),
        num_decode=step.num_decode,
        rope=rope,
    )


def _running_sum(counts: "NDArray[np.int32]") -> "NDArray[np.int32]":
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _sample_rows(step: Step, batch: tuple[Request, ...]) -> "NDArray[np.int64]":
    parts = [
        batch[i].tokens[cached : cached + new]
        for i, cached, new in zip(step.order, step.cached, step.new, strict=True)
    ]
    return np.concatenate(parts)


def _collect(out: "F32", step: Step, per_request: "list[F32]") -> None:
    row = 0
    for i, cached, new in zip(step.order, step.cached, step.new, strict=True):
        per_request[i][cached : cached + new] = out[row : row + new]
        row += new
