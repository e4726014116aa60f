# SPDX-License-Identifier: Apache-2.0
"""fastkv's own backends under the engine's interface: its layer, its batch, its `forward_mixed`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastkv.backends import get_backend
from fastkv.backends.resolve import resolve
from fastkv.batch import BatchMeta
from fastkv.contracts.presence import require_kind, require_tensor
from fastkv.errors import SpecMismatchError
from fastkv.integrations.fastdeploy.arguments import add_bias, float32_sinks, norm_arguments
from fastkv.integrations.fastdeploy.calls import refuse_unserved
from fastkv.integrations.fastdeploy.masks import intervals
from fastkv.integrations.fastdeploy.requests import Requests
from fastkv.integrations.fastdeploy.rotary import rope_of
from fastkv.integrations.fastdeploy.tensors import described, load_paddle
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from fastkv.backends import Device, Ops

_LAYER = ("linear_shift", "linear_smooth", "out_scale", "qkv_scale")


def meta_from(
    forward_meta: Any, spec: CacheSpec | None = None, *, gathered: bool = True
) -> BatchMeta:
    """The batch of a step, as fastkv's backends take it.

    Requests keep the engine's order, prefill and decode interleaved. `num_decode` counts the
    decode and idle requests before the first prefill request; a decode request behind it is served
    as one more prefill request over a cached prefix, which gives the same attention and, in the
    gathering backends, gathers its keys.

    Args:
        forward_meta: the engine's `ForwardMeta`: `caches`, `seq_lens_encoder`, `seq_lens_decoder`,
            `seq_lens_this_time`, `cu_seqlens_q`, `block_tables`, and, where it has them,
            `rotary_embs` and `attn_mask_offsets`.
        spec: what `caches` holds; None takes that of `forward_meta.attn_backend`, where it is an
            `AttentionBackend` of this module.
        gathered: also give `cu_seqlens_k`, `total_k` and `num_decode`, which the backends `flash`
            and `flash_mask` need; on a GPU this waits for the lengths, once a step.

    Raises:
        SpecMismatchError: `caches` has another length than the spec says.
        UnsupportedError: `attn_mask`, or tables of `rope_3d`.
        ContractError: a field that is missing or misshapen.
    """
    op = "meta_from"
    if spec is None:
        spec = getattr(getattr(forward_meta, "attn_backend", None), "spec", None)
    require_kind(op, "spec", spec, CacheSpec)
    assert isinstance(spec, CacheSpec), "required just above"
    given = {name: getattr(forward_meta, name, None) for name in _FIELDS}
    refuse_unserved(op, None, given, "forward_meta.")
    caches = _caches(op, given["caches"], spec)
    requests = Requests.from_fields(op, given)
    rope = offsets = None
    if given["rotary_embs"] is not None:
        rope = rope_of(op, given["rotary_embs"], spec.head_dim)
    if given["attn_mask_offsets"] is not None:
        flat = given["attn_mask_offsets"]
        info = described(op, "attn_mask_offsets", flat, "int32 [2T]")
        rows = info.shape[0] if len(info.shape) == 2 else info.shape[0] // 2
        offsets = intervals(op, "attn_mask_offsets", flat, rows)
    segments = _segments(requests) if gathered else {}
    return BatchMeta(caches, spec, **requests.paged(), **segments, rope=rope, mask_offsets=offsets)


_FIELDS = (
    "attn_mask",
    "attn_mask_offsets",
    "block_tables",
    "caches",
    "cu_seqlens_q",
    "rotary_embs",
    "seq_lens_decoder",
    "seq_lens_encoder",
    "seq_lens_this_time",
)


def _caches(op: str, caches: Any, spec: CacheSpec) -> list[Any]:
    require_tensor(op, "caches", caches, "the engine's list of cache tensors")
    if len(caches) == spec.num_tensors:
        return list(caches)
    raise SpecMismatchError(
        op,
        "caches",
        format=", ".join(sorted({spec.layer_quant(i).name.value for i in range(spec.num_layers)})),
        expected=f"a list of {spec.num_tensors} tensors for {spec.num_layers} layers",
        got=f"{len(caches)} tensors",
    )


def _segments(requests: Requests) -> dict[str, Any]:
    """Contiguous K and V of all but the leading decode requests."""
    import numpy as np

    new = np.diff(requests.cu_seqlens_q.numpy())
    needs = (new > 0) & requests.is_prefill.numpy()
    decode = int(np.argmax(needs)) if needs.any() else len(new)
    counts = np.where((np.arange(len(new)) >= decode) & (new > 0), requests.cached.numpy() + new, 0)
    sums = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    place = requests.cu_seqlens_q.place
    return {
        "cu_seqlens_k": load_paddle().to_tensor(sums, place=place),
        "total_k": int(sums[-1]),
        "num_decode": decode,
    }


class LayerView:
    """The engine's layer, with the options that fastkv reads under other names or in other ways.

    Args:
        layer: the engine's; every other attribute is its own.
        changed: attributes that take the place of the layer's.
    """

    def __init__(self, layer: Any, changed: Mapping[str, Any]) -> None:
        self._layer = layer
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class AttentionBackend:
    """A backend of fastkv's with the `forward_mixed` of the engine's.

    Args:
        spec: the cache, `spec_from_config` of the model or its `shard`.
        name: `append`, `flash`, `flash_mask`; None takes what `FASTKV_ATTENTION_BACKEND` says, or
            `auto`.
        device: as in `select_backend`.
        causal: the model's.
        ops: the ops to drive; None takes `fastkv.ops`.
    """

    def __init__(
        self,
        spec: CacheSpec,
        name: str | None = None,
        device: "Device | str" = "cpu",
        *,
        causal: bool = True,
        ops: "Ops | None" = None,
    ) -> None:
        self.spec = spec
        self.backend = get_backend(spec, name=name, device=device, ops=ops)
        self.causal = causal
        self._step: tuple[Any, BatchMeta] | None = None

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Begin a step: what follows for the same `forward_meta` shares its `BatchMeta`."""
        self._step = (forward_meta, self._meta(forward_meta))

    def forward_mixed(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """Serve one layer of a step, with the engine's arguments.

        Args:
            q: not read.
            k: not read.
            v: not read.
            qkv: `[T, (Hq + 2*Hkv) * D]`, bf16, fp16 or fp32.
            compressed_kv: None.
            k_pe: None.
            layer: the engine's; `resolve` takes it as it is. Its norm comes after RoPE.
            forward_meta: see `meta_from`.

        Returns:
            `[T, Hq * D]` in qkv's dtype.

        Raises:
            ContractError: an argument that is missing, misshapen or not served; nothing has been
                written then.
        """
        op = f"fastdeploy.{self.backend.name}.forward_mixed"
        refuse_unserved(op, None, {"compressed_kv": compressed_kv, "k_pe": k_pe})
        meta = self._meta_of(forward_meta)
        quant = resolve(meta.caches, layer, self.spec).quant.name.value
        given = {name: getattr(layer, name, None) for name in _LAYER}
        refuse_unserved(op, quant, given, "layer.")
        view, meta = self._adapted(op, layer, meta, quant)
        qkv = add_bias(op, qkv, getattr(layer, "qkv_bias", None), quant, "layer.qkv_bias")
        out = self.backend.forward_mixed(qkv, view, meta)
        return out.reshape([out.shape[0], out.shape[1] * out.shape[2]])

    def _meta(self, forward_meta: Any) -> BatchMeta:
        gathers = "gather_kv" in self.backend.row.prefill
        return meta_from(forward_meta, self.spec, gathered=gathers)

    def _meta_of(self, forward_meta: Any) -> BatchMeta:
        if self._step is not None and self._step[0] is forward_meta:
            return self._step[1]
        return self._meta(forward_meta)

    def _adapted(
        self,
        op: str,
        layer: Any,
        meta: BatchMeta,
        fmt: str,
    ) -> tuple[LayerView, BatchMeta]:
        """The layer with fastkv's options, and the batch with its window in the intervals."""
        in_kernel = not getattr(layer, "qk_norm_before_rope", False)
        names = ("q_norm_weight", "k_norm_weight")
        q_weight, k_weight = (getattr(layer, name, None) if in_kernel else None for name in names)
        norm = norm_arguments(op, q_weight, k_weight, 0.0, fmt)
        changed = {
            **{name: norm[name] for name in names},
            "norm_after_rope": norm["norm_after_rope"],
            "sinks": float32_sinks(op, getattr(layer, "sinks", None), fmt),
            "causal": self.causal,
        }
        if meta.mask_offsets is not None:  # see `intervals`
            window = getattr(layer, "sliding_window", None) or None
            rows = int(meta.mask_offsets.shape[0])
            offsets = intervals(op, "attn_mask_offsets", meta.mask_offsets, rows, window, fmt)
            meta = replace(meta, mask_offsets=offsets)
            changed |= {"causal": False, "sliding_window": None}
        return LayerView(layer, changed), meta
