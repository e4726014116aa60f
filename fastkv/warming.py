# SPDX-License-Identifier: Apache-2.0
"""Compile and load a cache's kernels ahead of the first request.

Each op is called on a tiny batch of the spec's own formats and shapes, so that what is compiled is
what will be asked for. CuPy keeps the binaries on disk: a later process only loads them.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastkv.backends.kernels import Device
from fastkv.backends.select import select_backend
from fastkv.contracts.numbers import is_integer
from fastkv.dtypes import canonical_float
from fastkv.errors import ContractError, DtypeError, MissingDependencyError, PlacementError
from fastkv.quant import Granularity
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.rope import Rope
    from fastkv.scales import StaticScales

_OP = "warmup"
#: Rows a request that kernels are specialized for: decode, draft tokens, prefill.
ROWS = (1, 2, 4, 8, 64)
_PAGES = 4


@dataclass(frozen=True, slots=True)
class Warmed:
    """One op of one format, ready.

    Attributes:
        op: its name.
        format: of the cache; None for an op without one.
        kernels: how many were compiled, or loaded from the disk, and not there before.
        seconds: that it took.
    """

    op: str
    format: str | None
    kernels: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Model:
    """What the batches are made for."""

    spec: CacheSpec
    num_query_heads: int
    dtype: str
    device: str
    library: str
    rotary_dim: int
    interleaved: bool
    qk_norm: bool
    norm_after_rope: bool
    granularity: Granularity | None
    static_dtype: str

    def zeros(self, *shape: int, dtype: str | None = None) -> Any:
        """A zero-filled tensor on the device."""
        from fastkv import arrays

        return arrays.zeros(self.library, shape, dtype or self.dtype, self.device)

    def integers(self, *values: Any) -> Any:
        """An int32 tensor on the device."""
        import numpy as np

        from fastkv import arrays

        return arrays.convert(np.array(values, np.int32), self.library, self.device)


def warmup(
    spec: CacheSpec,
    *,
    num_query_heads: int,
    dtype: str = "bfloat16",
    device: str = "cuda:0",
    rotary_dim: int | None = None,
    interleaved: bool = False,
    qk_norm: bool = False,
    norm_after_rope: bool = False,
    granularity: Granularity | str | None = None,
    static_dtype: str = "float32",
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Warmed]:
    """Compile and load every kernel that the backends will run for a spec.

    Args:
        spec: the cache; each of its formats is warmed up once.
        num_query_heads: Hq.
        dtype: of qkv and out: bfloat16 or float16.
        device: `cuda:N`.
        rotary_dim: of the rope; None is D, 0 is no rope.
        interleaved: of the rope.
        qk_norm: layers have QK-norm, its weights in `dtype`.
        norm_after_rope: where it stands.
        granularity: of static scales; None takes each format's preferred one.
        static_dtype: of static scales.
        progress: called with `(done, all, what is next)` before each op, and once at the end.

    Returns:
        One row an op and format, in the order in which they ran.

    Raises:
        MissingDependencyError: CuPy or cuda-bindings is absent, or PyTorch where bfloat16 takes it.
        PlacementError: there is no such GPU.
        SelectionError: the device or its kernels do not serve the spec, with the reasons.
        ContractError: an argument that cannot be.
    """
    model = _Model(
        spec,
        num_query_heads,
        _require_dtype("dtype", dtype, ("bfloat16", "float16")),
        device,
        "",
        spec.head_dim if rotary_dim is None else rotary_dim,
        interleaved,
        qk_norm,
        norm_after_rope,
        None if granularity is None else _require_granularity(granularity),
        _require_dtype("static_dtype", static_dtype, ("float32", "bfloat16", "float16")),
    )
    _require_rotary(model.rotary_dim, spec.head_dim)
    where = _require_gpu(device)
    select_backend("append", spec, where, num_query_heads=num_query_heads)
    return _run(replace(model, library=_library(model)), progress or _silent)


def _run(model: _Model, progress: Callable[[int, int, str], None]) -> list[Warmed]:
    from fastkv.ops.cuda import jit

    steps = list(_steps(model))
    done: list[Warmed] = []
    for i, (op, layer, call) in enumerate(steps):
        name = None if layer is None else model.spec.layer_quant(layer).name.value
        progress(i, len(steps), f"{op} {name or ''}".rstrip())
        before, started = jit.loaded(), time.perf_counter()
        call()
        _synchronize(model.device)
        seconds = time.perf_counter() - started
        done.append(Warmed(op, name, jit.loaded() - before, seconds))
    progress(len(steps), len(steps), "")
    return done


def _steps(model: _Model) -> Iterator[tuple[str, int | None, Callable[[], None]]]:
    """Op, layer and call of everything to warm up."""
    spec = model.spec
    formats = {spec.layer_quant(i).name: i for i in reversed(range(spec.num_layers))}
    for layer in sorted(formats.values()):
        for op, call in (
            ("rope_write_kv", _write),
            ("paged_attention", _attend),
            ("gather_kv", _gather),
            ("copy_pages", _copy),
        ):
            yield op, layer, _bound(call, model, layer)
    yield "masked_attention", None, lambda: _attend_contiguous(model)
    yield "merge_states", None, lambda: _merge(model)


def _bound(
    call: "Callable[[_Model, LayerCache], None]", model: _Model, layer: int
) -> Callable[[], None]:
    return lambda: call(model, _cache(model, layer))


def _cache(model: _Model, layer: int) -> "LayerCache":
    from fastkv.cache import LayerCache

    tensors = model.spec.layer_tensors(layer, _PAGES)
    made = {t.name: model.zeros(*t.shape, dtype=t.dtype) for t in tensors}
    return LayerCache(model.spec, layer, **made, static=_static(model, layer))


def _static(model: _Model, layer: int) -> "StaticScales | None":
    import numpy as np

    from fastkv import arrays
    from fastkv.scales import StaticScales

    quant, spec = model.spec.layer_quant(layer), model.spec
    if not quant.needs_static:
        return None
    layout = quant.granularities[0]
    if model.granularity in quant.granularities:
        layout = model.granularity
    shape = (spec.num_kv_heads, spec.head_dim)[: 2 if layout is Granularity.CHANNEL else 1]
    ones = np.ones(shape, arrays.numpy_dtype(model.static_dtype))
    return StaticScales(
        **{name: arrays.convert(ones, model.library, model.device) for name in quant.static_fields}
    )


def _batch(model: _Model, rows: int) -> dict[str, Any]:
    """One request with `rows` new tokens and none cached, over pages that all exist."""
    pages = -(-rows // model.spec.page_size)
    return {
        "cu_seqlens_q": model.integers(0, rows),
        "cache_seqlens": model.integers(0),
        "block_table": model.integers([*range(pages)]),
    }


def _write(model: _Model, cache: "LayerCache") -> None:
    from fastkv import ops

    spec = model.spec
    width = (model.num_query_heads + 2 * spec.num_kv_heads) * spec.head_dim
    norm = model.zeros(spec.head_dim) if model.qk_norm else None
    # Without contiguous K and V, as append and decode rows do, and with them, as prefill of flash.
    for contiguous in ({}, _contiguous(model)):
        ops.rope_write_kv(
            model.zeros(1, width),
            cache,
            **_batch(model, 1),
            rope=_rope(model),
            q_norm_weight=norm,
            k_norm_weight=norm,
            norm_after_rope=model.norm_after_rope,
            **contiguous,
        )


def _contiguous(model: _Model) -> dict[str, Any]:
    """Room for one token's K and V in qkv's dtype, which the flash backends give it."""
    shape = (1, model.spec.num_kv_heads, model.spec.head_dim)
    out_k, out_v = model.zeros(*shape), model.zeros(*shape)
    return {"out_k": out_k, "out_v": out_v, "cu_seqlens_k": model.integers(0, 1)}


def _rope(model: _Model) -> "Rope | None":
    from fastkv.rope import Rope

    if not model.rotary_dim:
        return None
    cos, sin = (model.zeros(1, model.rotary_dim // 2, dtype="float32") for _ in range(2))
    return Rope(cos, sin, interleaved=model.interleaved)


def _attend(model: _Model, cache: "LayerCache") -> None:
    from fastkv import ops

    most = _PAGES * model.spec.page_size
    for rows in sorted({min(rows, most) for rows in ROWS}):
        q = model.zeros(rows, model.num_query_heads, model.spec.head_dim)
        ops.paged_attention(q, cache, **_batch(model, rows))


def _gather(model: _Model, cache: "LayerCache") -> None:
    from fastkv import ops

    batch = {"cache_seqlens": model.integers(1), "block_table": model.integers([0])}
    ops.gather_kv(cache, **batch, **_contiguous(model))


def _copy(model: _Model, cache: "LayerCache") -> None:
    from fastkv import ops

    ops.copy_pages(cache, model.integers(0), model.integers(1))


def _attend_contiguous(model: _Model) -> None:
    """What the flash backends run on prefill rows: K and V have qkv's dtype, not the cache's."""
    from fastkv import ops

    made = _contiguous(model)
    q = model.zeros(1, model.num_query_heads, model.spec.head_dim)
    sums = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), made["cu_seqlens_k"])
    ops.masked_attention(q, made["out_k"], made["out_v"], **sums)


def _merge(model: _Model) -> None:
    from fastkv import ops

    shape = (1, model.num_query_heads, model.spec.head_dim)
    lse = model.zeros(*shape[:2], dtype="float32")
    ops.merge_states(model.zeros(*shape), lse, model.zeros(*shape), lse)


def _require_dtype(name: str, value: str, known: tuple[str, ...]) -> str:
    dtype = canonical_float(value)
    if dtype not in known:
        raise DtypeError(_OP, name, expected=" or ".join(known), got=repr(value))
    return dtype


def _require_granularity(value: Granularity | str) -> Granularity:
    try:
        return Granularity(value)
    except ValueError as error:
        known = " or ".join(g.value for g in Granularity)
        raise ContractError(_OP, "granularity", expected=known, got=repr(value)) from error


def _require_rotary(value: object, dim: int) -> None:
    if not is_integer(value) or not 0 <= value <= dim or value % 2:
        expected = f"None or an even integer from 0 to D = {dim}"
        raise ContractError(_OP, "rotary_dim", expected=expected, got=repr(value))


def _require_gpu(device: str) -> Device:
    """The device's capability, from CuPy, which compiles for it."""
    from fastkv.arrays.library import cuda_index
    from fastkv.ops.cuda import jit
    from fastkv.optional import require

    index = cuda_index(_OP, "a GPU", device)
    cupy = require("cupy", "Warming up kernels", jit.INSTALL)
    require("cuda.bindings", "Warming up kernels", jit.INSTALL)
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # a missing driver raises CuPy's own exceptions
        raise _no_gpu(device, f"{type(error).__name__}: {error}") from error
    if index >= count:
        raise _no_gpu(device, f"{count} GPU(s)")
    return Device("cuda", jit.device_facts(index).sm)


def _no_gpu(device: str, got: str) -> PlacementError:
    return PlacementError(
        _OP, "device", expected=f"{device}, an NVIDIA GPU that CuPy sees", got=got
    )


def _library(model: _Model) -> str:
    """PyTorch where it sees GPUs; CuPy does where no tensor is bfloat16, which it lacks."""
    if _torch_sees_gpus():
        return "torch"
    spec = model.spec
    dtypes = {spec.storage_dtype(i) for i in range(spec.num_layers)}
    dtypes |= {model.dtype, spec.scale_dtype, model.static_dtype}
    if "bfloat16" in dtypes:
        raise MissingDependencyError(
            "Warming up bfloat16 kernels",
            "torch with CUDA",
            "pip install 'fastkv[torch]' (CuPy has no bfloat16; float16 needs CuPy alone)",
        )
    return "cupy"


def _torch_sees_gpus() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def _synchronize(device: str) -> None:
    import cupy

    with cupy.cuda.Device(int(device.partition(":")[2] or 0)):
        cupy.cuda.runtime.deviceSynchronize()


def _silent(*_: object) -> None:
    """Nobody watches."""
