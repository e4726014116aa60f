# SPDX-License-Identifier: Apache-2.0
"""What two caches must have in common before a block of one means anything in the other."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from typing import TYPE_CHECKING

from fastkv.errors import FingerprintError, MalformedError, MissingTensorError, SpecError
from fastkv.scales.bundle import FIELDS

if TYPE_CHECKING:
    from fastkv.scales import StaticScales
    from fastkv.spec import CacheSpec

#: Of the bytes of a block: the order of its parts, and how each format stores values.
VERSION = 1
#: Bytes of an encoded fingerprint, at most.
MAX_ENCODED = 1 << 16
_MAX_TEXT = 256
_MAX_LAYERS = 2048


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of a cache's blocks; make one with `Fingerprint.of`.

    Attributes:
        version: of the layout of a block's bytes.
        model: the model's name, as the user gives it: say, its path and revision.
        num_layers: layers that keep a cache.
        num_kv_heads: KV heads of this cache, a shard's own.
        shard_rank: which part of the KV heads this is.
        shard_size: of how many.
        head_dim: D.
        page_size: P, tokens a block.
        dtype: what `none` layers store.
        formats: the cache format of each layer.
        scale_dtype: dtype of paged scales.
        granularities: what shares a static multiplier, for each layer: `head`, `channel` or empty.
        scales_digest: of all static multipliers and zero points; empty where there are none.
    """

    version: int
    model: str
    num_layers: int
    num_kv_heads: int
    shard_rank: int
    shard_size: int
    head_dim: int
    page_size: int
    dtype: str
    formats: tuple[str, ...]
    scale_dtype: str
    granularities: tuple[str, ...]
    scales_digest: str

    @classmethod
    def of(
        cls,
        spec: "CacheSpec",
        *,
        model: str,
        scales: "Mapping[int, StaticScales] | None" = None,
        shard_rank: int = 0,
        shard_size: int = 1,
    ) -> "Fingerprint":
        """The fingerprint of a cache.

        Args:
            spec: of this cache; on a rank of a tensor-parallel group, the rank's own.
            model: the model's name, 1 to 256 characters. Two models of one shape differ only
                in this.
            scales: layer id to the layer's static scales, tensors on the CPU; needed where a
                format has them. A rank's own.
            shard_rank: this rank of the tensor-parallel group.
            shard_size: ranks of that group.

        Raises:
            MissingTensorError: a layer's static scales are absent.
            SpecError: a rank outside the group, a name empty or too long, more than 2048 layers.
        """
        op = "Fingerprint.of"
        if not 0 < len(model) <= _MAX_TEXT:
            expected = f"a name of 1 to {_MAX_TEXT} characters"
            raise SpecError(op, "model", expected=expected, got=repr(model)[:80])
        if spec.num_layers > _MAX_LAYERS:
            expected = f"at most {_MAX_LAYERS}"
            raise SpecError(op, "num_layers", expected=expected, got=str(spec.num_layers))
        if not 0 <= shard_rank < shard_size:
            got = f"rank {shard_rank!r} of {shard_size!r}"
            raise SpecError(op, "shard_rank", expected="0 <= rank < size", got=got)
        granularities, digest = _digest_scales(op, spec, scales or {})
        return cls(
            version=VERSION,
            model=model,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            shard_rank=int(shard_rank),
            shard_size=int(shard_size),
            head_dim=spec.head_dim,
            page_size=spec.page_size,
            dtype=spec.dtype,
            formats=tuple(spec.layer_quant(i).name.value for i in range(spec.num_layers)),
            scale_dtype=spec.scale_dtype,
            granularities=granularities,
            scales_digest=digest,
        )

    def encode(self) -> bytes:
        """The one encoding of this fingerprint, at most `MAX_ENCODED` bytes."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Fingerprint":
        """The fingerprint of an encoding.

        Raises:
            MalformedError: anything that `encode` does not give; the bytes may be hostile.
        """
        op = "Fingerprint.decode"
        if len(data) > MAX_ENCODED:
            raise MalformedError(op, f"{len(data)} bytes, more than {MAX_ENCODED}")
        try:
            found = json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise MalformedError(op, f"no JSON ({type(error).__name__})") from None
        if not isinstance(found, dict) or found.keys() != _CHECKS.keys():
            raise MalformedError(op, "other fields than a fingerprint has")
        for name, check in _CHECKS.items():
            if not check(found[name]):
                raise MalformedError(op, f"a value that {name} cannot have")
        lists = {name: tuple(found[name]) for name in ("formats", "granularities")}
        fingerprint = cls(**{**found, **lists})
        if fingerprint.encode() != data:  # else two byte strings would name one cache
            raise MalformedError(op, "not the canonical encoding")
        return fingerprint

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that stand for the whole fingerprint, for keys of a store."""
        return blake2b(self.encode(), digest_size=16).hexdigest()

    def differences(self, other: "Fingerprint") -> tuple[str, ...]:
        """Names of the fields that differ."""
        names = (field.name for field in fields(self))
        return tuple(name for name in names if getattr(self, name) != getattr(other, name))

    def require_equal(self, other: "Fingerprint", op: str) -> None:
        """Raise `FingerprintError`, with the fields that differ and both values, if any does."""
        differ = self.differences(other)
        if differ:
            raise FingerprintError(
                op, [(name, _text(self, name), _text(other, name)) for name in differ]
            )


def _text(fingerprint: Fingerprint, name: str) -> str:
    value = getattr(fingerprint, name)
    if isinstance(value, tuple):
        value = value[0] if len(set(value)) == 1 else ", ".join(value)
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _digest_scales(
    op: str, spec: "CacheSpec", scales: "Mapping[int, StaticScales]"
) -> tuple[tuple[str, ...], str]:
    """The granularity of each layer, and a digest of the values that its ops multiply with.

    Values count, not their dtype or shape: 16-bit multipliers are exact in float32, and `[Hkv, D]`
    is the same as `[Hkv * D]`.
    """
    import numpy as np

    from fastkv import arrays

    granularities, state = [], blake2b(digest_size=16)
    for layer in range(spec.num_layers):
        wanted = spec.layer_quant(layer).static_fields
        if wanted and layer not in scales:
            raise MissingTensorError(
                op,
                f"scales[{layer}]",
                format=spec.layer_quant(layer).name.value,
                expected="the layer's StaticScales",
                got="None",
            )
        sizes = set()
        for name in FIELDS:
            array = getattr(scales[layer], name) if name in wanted else None
            if array is None:
                continue
            values = np.ascontiguousarray(arrays.to_host(array), dtype="<f4").reshape(-1)
            state.update(f"{layer}.{name}:{values.size};".encode() + values.tobytes())
            sizes.add(values.size)
        heads_only = sizes == {spec.num_kv_heads}
        granularities.append(("head" if heads_only else "channel") if wanted else "")
    return tuple(granularities), state.hexdigest() if any(granularities) else ""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _are_names(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_LAYERS and all(map(_is_name, value))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 24 and value.isascii()


_CHECKS: dict[str, Callable[[object], bool]] = {
    "version": _is_count,
    "model": _is_text,
    "num_layers": _is_count,
    "num_kv_heads": _is_count,
    "shard_rank": _is_count,
    "shard_size": _is_count,
    "head_dim": _is_count,
    "page_size": _is_count,
    "dtype": _is_name,
    "formats": _are_names,
    "scale_dtype": _is_name,
    "granularities": _are_names,
    "scales_digest": lambda value: isinstance(value, str) and len(value) in {0, 32},
}
