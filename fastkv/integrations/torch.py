# SPDX-License-Identifier: Apache-2.0
"""fastkv's ops as custom ops of PyTorch, so that `torch.compile(fullgraph=True)` takes them.

`torch.ops.fastkv.rope_write_kv` and `torch.ops.fastkv.paged_attention` take a layer's tensors one
by one, since a graph knows tensors and numbers and no `LayerCache`. The functions of the same
names here take a `LayerCache`: traced by the compiler they become those ops; otherwise they call
`fastkv.ops` directly, which spares the dispatcher's time.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from fastkv import ops
from fastkv.cache import LayerCache
from fastkv.optional import require
from fastkv.quant import quant_spec
from fastkv.rope import Rope
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

torch = require("torch", "fastkv.integrations.torch", "pip install 'fastkv[torch]'")

_FIELDS = ("k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp")
_LAYER = (
    "Tensor({0}) k_cache, Tensor({1}) v_cache, Tensor({2})? k_scale, Tensor({3})? v_scale, "
    "Tensor[] static, str format"
)
_READ = _LAYER.replace("({0})", "").replace("({1})", "").replace("({2})", "").replace("({3})", "")
_WRITTEN = _LAYER.format("a!", "b!", "c!", "d!")
_BATCH = ("cu_seqlens_q", "cache_seqlens", "block_table")
_OPTIONS = ("scale", "window", "soft_cap", "sinks", "mask_offsets")


def rope_write_kv(
    qkv: Any,
    layer: LayerCache,
    *,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    rope: Rope | None = None,
) -> Any:
    """`fastkv.ops.rope_write_kv` without norms and contiguous K and V, eager or compiled.

    Args:
        qkv: `[T, (Hq + 2*Hkv) * D]`, bf16, fp16 or fp32.
        layer: the layer's cache, of PyTorch tensors; written.
        cu_seqlens_q: int32 `[B+1]`.
        cache_seqlens: int32 `[B]`.
        block_table: int32 `[B, M]`.
        rope: None leaves Q and K as they are.

    Returns:
        `q [T, Hq, D]` in qkv's dtype.

    Raises:
        ContractError: as the op; nothing has been written then.
    """
    batch = (cu_seqlens_q, cache_seqlens, block_table)
    if torch.compiler.is_compiling():
        tables = () if rope is None else (rope.cos, rope.sin, rope.interleaved)
        return torch.ops.fastkv.rope_write_kv(qkv, *_parts(layer), *batch, *tables)
    return ops.rope_write_kv(qkv, layer, **dict(zip(_BATCH, batch, strict=True)), rope=rope)


def paged_attention(
    q: Any,
    layer: LayerCache,
    *,
    cu_seqlens_q: Any,
    cache_seqlens: Any,
    block_table: Any,
    **options: Any,
) -> Any:
    """`fastkv.ops.paged_attention`, causal, eager or compiled.

    Args:
        q: `[T, Hq, D]`, bf16, fp16 or fp32.
        layer: the layer's cache, of PyTorch tensors; only read.
        cu_seqlens_q: int32 `[B+1]`.
        cache_seqlens: int32 `[B]`.
        block_table: int32 `[B, M]`.
        **options: `scale`, `window`, `soft_cap`, `sinks` and `mask_offsets`, as in the op.

    Returns:
        `out [T, Hq, D]` in q's dtype.

    Raises:
        ContractError: as the op.
    """
    batch = (cu_seqlens_q, cache_seqlens, block_table)
    if torch.compiler.is_compiling():
        return torch.ops.fastkv.paged_attention(
            q, *_parts(layer), *batch, *map(options.get, _OPTIONS)
        )
    return ops.paged_attention(q, layer, **dict(zip(_BATCH, batch, strict=True)), **options)


def _parts(layer: LayerCache) -> tuple[Any, ...]:
    """A layer as the custom ops take it."""
    static = layer.static
    given = [] if static is None else [getattr(static, name) for name in layer.quant.static_fields]
    return layer.k, layer.v, layer.k_scale, layer.v_scale, given, layer.quant.name.value


def _layer(
    k: Any, v: Any, k_scale: Any, v_scale: Any, static: Sequence[Any], quant: str
) -> LayerCache:
    """The `LayerCache` of what a custom op was given."""
    row = quant_spec(quant, op="torch.ops.fastkv", argument="format")
    _, heads, page_size, width = k.shape
    dtype = _name(k) if row.storage is None else "bfloat16"
    scale_dtype = "float32" if k_scale is None else _name(k_scale)
    spec = _spec(heads, width * row.elements_per_item, page_size, quant, dtype, scale_dtype)
    bundle = StaticScales(**dict(zip(_FIELDS, static, strict=False))) if static else None
    return LayerCache(spec, 0, k, v, k_scale, v_scale, bundle)


@cache
def _spec(
    heads: int, dim: int, page_size: int, quant: str, dtype: str, scale_dtype: str
) -> CacheSpec:
    # One object for equal specs: contracts are remembered by it.
    return CacheSpec(1, heads, dim, page_size, quant, dtype, scale_dtype)


def _name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# A custom op's arguments come by position, and the dispatcher leaves out defaults at the end.


def _rope_write_kv(qkv: Any, *parts: Any) -> Any:
    layer, batch, rope = parts[:6], parts[6:9], parts[9:]
    return ops.rope_write_kv(
        qkv,
        _layer(*layer),
        **dict(zip(_BATCH, batch, strict=True)),
        rope=Rope(*rope) if rope and rope[0] is not None else None,
    )


def _rope_write_kv_fake(qkv: Any, *parts: Any) -> Any:
    k, *_, quant = parts[:6]
    dim = k.shape[3] * quant_spec(quant).elements_per_item
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // dim - 2 * k.shape[1], dim)


def _paged_attention(q: Any, *parts: Any) -> Any:
    layer, batch, options = parts[:6], parts[6:9], parts[9:]
    given = dict(zip(_BATCH, batch, strict=True)) | dict(zip(_OPTIONS, options, strict=False))
    return ops.paged_attention(q, _layer(*layer), **given)


def _paged_attention_fake(q: Any, *_: Any) -> Any:
    return q.new_empty(q.shape)


def _define() -> None:
    """Register both ops; once a process, however often the module is reloaded."""
    batch = ", ".join(f"Tensor {name}" for name in _BATCH)
    rope = "Tensor? cos=None, Tensor? sin=None, bool interleaved=False"
    numbers = "float? scale=None, int? window=None, float? soft_cap=None"
    tensors = "Tensor? sinks=None, Tensor? mask_offsets=None"
    write = torch.library.custom_op(
        "fastkv::rope_write_kv",
        _rope_write_kv,
        mutates_args=("k_cache", "v_cache", "k_scale", "v_scale"),
        schema=f"(Tensor qkv, {_WRITTEN}, {batch}, {rope}) -> Tensor",
    )
    write.register_fake(_rope_write_kv_fake)
    attend = torch.library.custom_op(
        "fastkv::paged_attention",
        _paged_attention,
        mutates_args=(),
        schema=f"(Tensor q, {_READ}, {batch}, {numbers}, {tensors}) -> Tensor",
    )
    attend.register_fake(_paged_attention_fake)


_define()
