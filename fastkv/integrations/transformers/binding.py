# SPDX-License-Identifier: Apache-2.0
"""What a `PagedCache` is for, fixed by its first attention; and what it refuses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastkv.backends import select_backend
from fastkv.contracts.numbers import is_integer
from fastkv.contracts.presence import require_kind
from fastkv.errors import (
    DtypeError,
    MissingTensorError,
    PlacementError,
    ShapeError,
    SpecError,
    SpecMismatchError,
    SurplusTensorError,
    UnsupportedError,
)
from fastkv.quant import QuantSpec, QuantType, quant_spec
from fastkv.scales import StaticScales
from fastkv.spec import CacheSpec

OP = "PagedCache"
_SERVED_LAYERS = ("full_attention", "sliding_attention")

Formats = QuantType | str | Sequence[QuantType | str]
Scales = Mapping[int, StaticScales] | None


def require_formats(formats: Formats) -> tuple[QuantSpec, ...]:
    """The rows of one format, or of one a layer; raises `UnknownNameError`."""
    names = [formats] if isinstance(formats, str) or not isinstance(formats, Sequence) else formats
    return tuple(quant_spec(name, op=OP, argument="format") for name in names)


def require_scales(rows: tuple[QuantSpec, ...], scales: Scales) -> None:
    """Scales for static formats, and for no others."""
    if scales is not None:
        require_kind(OP, "scales", scales, Mapping)
        for layer, bundle in scales.items():
            require_kind(OP, f"scales[{layer}]", bundle, StaticScales)
    static = next((row for row in rows if row.needs_static), None)
    if static is not None and scales is None:
        raise MissingTensorError(
            OP,
            "scales",
            format=static.name.value,
            expected="StaticScales of each layer, {layer: StaticScales}",
            got="None",
            hint="fastkv.integrations.transformers.calibrate makes them.",
        )
    if static is None and scales is not None:
        raise SurplusTensorError(
            OP,
            "scales",
            format=rows[0].name.value,
            expected="None: no layer's format has static scales",
            got=f"scales of {len(scales)} layers",
        )


def model_shape(config: Any) -> tuple[int, int, int]:
    """Hq, Hkv and D by a text model's config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def require_options(
    rows: tuple[QuantSpec, ...], page_size: int, reserve: int, scale_dtype: str
) -> None:
    """What no model can make right: a page size, a reserve or a dtype of scales that is none."""
    formats = tuple(row.name for row in rows)
    CacheSpec(len(rows), 1, 2, page_size, formats, scale_dtype=scale_dtype)
    if not is_integer(reserve) or reserve < 0:
        raise SpecError(OP, "reserve", expected="an integer of at least 0", got=repr(reserve))


def require_model(model: Any, name: str) -> None:
    """Raise for what the first attention would refuse in a model, as far as it shows before.

    Args:
        model: whose cache this will be.
        name: of the attention that it must have.
    """
    config = model.config.get_text_config()
    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
    causal = all(getattr(module, "is_causal", True) for module in layers)
    checks = (
        ("attn_implementation", repr(name), repr(config._attn_implementation)),
        ("model", "model.eval()", "a model in training" if model.training else "model.eval()"),
        ("is_causal", "True", str(causal)),
        ("kv_lora_rank", "None: keys are cached", repr(getattr(config, "kv_lora_rank", None))),
    )
    for argument, expected, got in checks:
        if got != expected.partition(":")[0]:
            raise UnsupportedError(OP, argument, expected=expected, got=got)


@dataclass(frozen=True)
class Bound:
    """The model, batch and device of a cache.

    Attributes:
        spec: of the cache.
        static: each layer's scales on the device, None for a layer without.
        batch: B.
        query_heads: Hq.
        dtype: of K and V as the model computes them.
        device: of the model.
    """

    spec: CacheSpec
    static: tuple[StaticScales | None, ...]
    batch: int
    query_heads: int
    dtype: Any
    device: Any

    @classmethod
    def of(
        cls,
        config: Any,
        shape: tuple[int, int, int, int],
        dtype: Any,
        device: Any,
        formats: Formats,
        scales: Scales,
        page_size: int,
        scale_dtype: str,
    ) -> "Bound":
        """For a model and a batch.

        Args:
            config: the model's.
            shape: B, Hq, Hkv, D.
            dtype: of K and V, PyTorch's.
            device: PyTorch's.
            formats: as `PagedCache` takes them, like all that follows.
            scales: likewise.
            page_size: likewise.
            scale_dtype: likewise.

        Raises:
            ContractError: heads, head dim, dtype, kinds of layers or scales that do not fit.
            SelectionError: no kernel serves them on the device.
        """
        require_served_layers(config)
        batch, query_heads, heads, dim = shape
        layers, name = config.num_hidden_layers, str(dtype).removeprefix("torch.")
        spec = CacheSpec(layers, heads, dim, page_size, formats, name, scale_dtype)
        require_kernels(spec, query_heads, device)
        static = static_scales(spec, scales, device)
        return cls(spec, static, batch, query_heads, dtype, device)

    def check(self, module: Any, layer_idx: int, query: Any, key: Any, value: Any) -> None:
        """Raise unless a layer's step is one of this model and batch."""
        spec = self.spec
        layers = module.config.num_hidden_layers
        if layers != spec.num_layers:
            raise SpecMismatchError(
                OP, "model", expected=f"the one it was filled by, of {spec.num_layers} layers",
                got=f"one of {layers} layers", hint="A cache is of one model."
            )  # fmt: skip
        quant = spec.layer_quant(layer_idx, op=OP).name.value
        kv = (self.batch, spec.num_kv_heads, key.shape[2], spec.head_dim)
        q = (self.batch, self.query_heads, key.shape[2], spec.head_dim)
        for name, x, want in (
            ("key_states", key, kv),
            ("value_states", value, kv),
            ("query", query, q),
        ):
            dims = f"[B, {'Hq' if name == 'query' else 'Hkv'}, S, D]"
            if tuple(x.shape) != want:
                raise ShapeError(
                    OP,
                    name,
                    format=quant,
                    expected=f"{dims} = {list(want)}",
                    got=str(list(x.shape)),
                )
            if x.dtype != self.dtype:
                raise DtypeError(OP, name, format=quant, expected=str(self.dtype), got=str(x.dtype))
            if x.device != self.device:
                raise PlacementError(
                    OP, name, format=quant, expected=f"a tensor on {self.device}", got=str(x.device)
                )


def require_served_layers(config: Any) -> None:
    """Raise `UnsupportedError` for layers whose attention is not full or over a window."""
    kinds = getattr(config, "layer_types", None) or ()
    other = next((kind for kind in kinds if kind not in _SERVED_LAYERS), None)
    if getattr(config, "attention_chunk_size", None) is not None:
        other = other or "chunked_attention"
    if other is not None:
        raise UnsupportedError(
            OP, "config.layer_types", expected=" or ".join(_SERVED_LAYERS), got=repr(other)
        )


def require_kernels(spec: CacheSpec, query_heads: int, device: Any) -> None:
    """Raise `SelectionError` unless kernels serve the cache on a PyTorch device."""
    where = str(device.type)
    if where == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"cuda:{10 * major + minor}"
    select_backend("append", spec, where, num_query_heads=query_heads)


def static_scales(spec: CacheSpec, scales: Scales, device: Any) -> tuple[StaticScales | None, ...]:
    """Each layer's scales, validated, on the device."""
    given = {} if scales is None else scales
    for layer in given:
        spec.layer_quant(layer, op=f"{OP}: scales")
    return tuple(_layer_static(spec, i, given.get(i), device) for i in range(spec.num_layers))


def _layer_static(
    spec: CacheSpec, layer: int, static: StaticScales | None, device: Any
) -> StaticScales | None:
    row = spec.layer_quant(layer)
    if static is None and not row.needs_static:
        return None
    if static is None:
        raise MissingTensorError(
            OP,
            f"scales[{layer}]",
            format=row.name.value,
            expected="StaticScales of the layer",
            got="None",
        )
    static.validate(spec, layer)
    return static.to("torch", str(device))
