# SPDX-License-Identifier: Apache-2.0
"""`helpers.mixed.Engine` as FastDeploy would run it: its batch, its layer, its backends.

Requests of a step come in any order. Lengths have a second dimension and rows behind the batch's,
as in the engine's buffers, with nonsense in them.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import ml_dtypes  # noqa: F401 - NumPy's names of bfloat16 and float8
import numpy as np
import paddle

from fastkv import arrays
from fastkv.integrations import fastdeploy
from helpers import fastdeploy_backends, mixed, oracle
from helpers.batches import static_scales

BACKENDS = ("append", "append_into", "flash", "flash_mask")
EXACT = {name: name.startswith("flash") for name in BACKENDS}
#: Width of the rotary tables, and what it is of head_dim.
STYLES = {"interleaved": 2, "neox": 1, "partial": 4}
fastdeploy.install(fastdeploy_backends)


@dataclass(frozen=True)
class Interleaved(mixed.Step):
    """The same requests, prefill and decode in turn, prefill first."""

    @property
    def _order(self):
        pairs = [*((e, True) for e in self.decode), *((e, False) for e in self.prefill)]
        decode, prefill = pairs[: len(self.decode)], pairs[len(self.decode) :]
        longest = max(len(decode), len(prefill))
        turns = [(p, d) for p, d in zip(fill(prefill, longest), fill(decode, longest), strict=True)]
        return [pair for turn in turns for pair in turn if pair is not None]

    @property
    def entries(self):
        return [entry for entry, _ in self._order]

    def is_decode(self, b):
        return self._order[b][1]


def fill(pairs, length):
    return [*pairs, *[None] * (length - len(pairs))]


class Gathered(Interleaved):
    """The same for fastkv's own backends, which gather all but the leading decode requests."""

    def is_gathered(self, b):
        prefill = [i for i, (entry, decode) in enumerate(self._order) if entry[1] and not decode]
        return b >= min(prefill, default=len(self._order))


#: `mixed.MIXTURE`; decode requests have a token in the cache, as the engine's have.
MIXTURE = tuple(Interleaved(step.decode, step.prefill) for step in mixed.MIXTURE)


def tensor(array):
    """A Paddle tensor over a copy."""
    return arrays.convert(np.ascontiguousarray(array), "paddle")


class Engine(mixed.Engine):
    """Runs a rebuilt backend of FastDeploy over fastkv's ops.

    Args:
        backend: one of `BACKENDS`, or `fastkv:` and the name of a backend of fastkv's.
        style: of the rotary tables, one of `STYLES`.
        omitted: what calls of an older version leave out; see `fastdeploy_backends`.
        bias: with `qkv_bias`.
        normed: with QK-norm, after RoPE.
        **options: as in `mixed.Engine`; `sliding_window` and `sinks` among them.
    """

    scale_dtype = "bfloat16"

    def __init__(
        self,
        rng,
        backend,
        fmt,
        *,
        style="interleaved",
        layer_id=1,
        omitted=(),
        bias=False,
        normed=True,
        **options,
    ):
        self.layer_id, self.style, self.fmt = layer_id, style, fmt
        self.interleaved = style == "interleaved"
        self.rotary = self.dim // 2 if style == "partial" else self.dim
        self.normed = normed
        self.own = backend.removeprefix("fastkv:") if backend.startswith("fastkv:") else None
        named = self.own or backend.partition("_into")[0]
        super().__init__(rng, named, fmt, norm_after_rope=True, **options)
        if not normed:
            del self.layer.q_norm_weight, self.layer.k_norm_weight
        self.run_backend = None if self.own else getattr(fastdeploy_backends, backend)
        self.omitted = omitted
        self.bias = rng.standard_normal((self.query_heads + 2 * self.heads) * self.dim)
        self.bias = self.bias.astype(self.dtype) if bias else None
        self.engine_layer = self._engine_layer()

    def _formats(self):
        return [self.fmt] * 3

    def _static(self):
        """In bfloat16 and flat, as the engine keeps multipliers."""
        layouts = {"cache_int8": "flat", "cache_int4_zp": "flat"}
        return static_scales(
            *(self.rng, self.fmt, self.heads, self.dim, layouts.get(self.fmt)),
            dtype="bfloat16",
            largest_zp=3.0,
        )

    def _engine_layer(self):
        layer = self.layer
        given = {name: tensor(a) for name, a in vars(layer).items() if isinstance(a, np.ndarray)}
        if self.fmt == "block_wise_fp8":  # created by the engine, and never filled
            sides = ("cache_k_scale", "cache_v_scale", "cache_k_out_scale", "cache_v_out_scale")
            given = {name: paddle.zeros([self.heads], "bfloat16") for name in sides} | given
        plain = {
            "q_norm_weight": None,
            "k_norm_weight": None,
            "rms_norm_eps": getattr(layer, "rms_norm_eps", 1e-6),
            "qkv_scale": None,
            "linear_shift": None,
            "linear_smooth": None,
            "out_scale": -1.0,
            "quant_max_bound": 448.0,
            "sliding_window": getattr(layer, "sliding_window", None) or 0,
            "use_neox_rotary_style": not self.interleaved,
            "qkv_bias": None if self.bias is None else tensor(self.bias),
        }
        if "sinks" in given:
            given["sinks"] = given["sinks"].astype("bfloat16")
        return SimpleNamespace(
            layer_id=self.layer_id, cache_quant_type_str=self.fmt, **(plain | given)
        )

    @property
    def config(self):
        return SimpleNamespace(
            num_heads=self.query_heads,
            kv_num_heads=self.heads,
            head_dim=self.dim,
            block_size=self.page,
            max_seq_len=8 * self.page,
            causal=self.layer.causal,
            encoder_block_shape_q=8,
            decoder_block_shape_q=4,
            draft_tokens=3,
            omitted=self.omitted,
        )

    def _values(self, qkv):
        values = oracle.values_of(qkv)
        if self.bias is None:
            return values
        # The sum in float32, rounded once to qkv's dtype.
        total = oracle.f32(values + oracle.values_of(self.bias))
        return oracle.from_bits(oracle.to_bits(total, self.dtype), self.dtype)

    def _rotate(self, heads, cached):
        if self.normed:
            return super()._rotate(heads, cached)
        q, k, v = np.split(heads, [self.query_heads, self.query_heads + self.heads], axis=1)
        at = slice(cached, cached + len(heads))
        tables = (self.rope.cos[at], self.rope.sin[at], self.interleaved)
        return oracle.rope(q, *tables), oracle.rope(k, *tables), v

    def _visible(self, new, length, intervals):
        """An interval stands in place of causality; a window counts from its end."""
        window = getattr(self.layer, "sliding_window", None)
        if intervals is None:
            return super()._visible(new, length, None)
        if window is not None:
            starts = np.maximum(intervals[:, 0], intervals[:, 1] - window)
            intervals = np.stack([starts, intervals[:, 1]], axis=1)
        return oracle.visible_mask(new, length, False, None, intervals)

    def meta(self, step, number=0, mask_offsets=None):
        self.step = step
        return super().meta(step, number, mask_offsets)

    def _forward(self, qkv, meta):
        forward_meta = self.forward_meta(qkv, meta)
        x = tensor(qkv)
        if self.own is None:
            out = self.run_backend(self.config, x, self.engine_layer, forward_meta)
        else:
            backend = fastdeploy.AttentionBackend(self.spec, self.own, causal=self.layer.causal)
            backend.init_attention_metadata(forward_meta)
            nothing = [None] * 2
            out = backend.forward_mixed(
                *(None, None, None, x, *nothing, self.engine_layer, forward_meta)
            )
        assert out.shape == [len(qkv), self.query_heads * self.dim]
        return arrays.to_host(out).reshape(len(qkv), self.query_heads, self.dim)

    def forward_meta(self, qkv, meta):
        """The engine's fields of a step."""
        new = np.diff(meta.cu_seqlens_q)
        decodes = np.array([self.step.is_decode(b) for b in range(len(new))], bool)
        behind = 2  # rows of requests that do not run

        def lengths(values):
            return tensor(np.append(values, [-7] * behind).astype(np.int32)[:, None])

        table = np.concatenate([meta.block_table, np.full((behind, 6), 99)]).astype(np.int32)
        offsets = meta.mask_offsets
        return SimpleNamespace(
            caches=[self._shared(cache) for cache in self.caches],
            seq_lens_encoder=lengths(np.where(decodes, 0, new)),
            seq_lens_decoder=lengths(meta.cache_seqlens),
            seq_lens_this_time=tensor(new.astype(np.int32)),
            cu_seqlens_q=tensor(meta.cu_seqlens_q),
            block_tables=tensor(table),
            batch_id_per_token=None,
            rotary_embs=self._tables(),
            attn_mask=None,
            attn_mask_offsets=None if offsets is None else tensor(offsets.reshape(-1)),
            **self._buffers(len(new)),
        )

    def _shared(self, cache):
        """The cache itself; the engine keeps one-byte formats as uint8."""
        return arrays.from_host(cache.view(np.uint8) if cache.itemsize == 1 else cache, "paddle")

    def _tables(self):
        if not self.rotated:
            return self._identity()
        cos, sin = (np.asarray(a) for a in (self.rope.cos, self.rope.sin))
        if self.style == "neox":
            cos, sin = (np.concatenate([a, a], axis=1) for a in (cos, sin))
        return tensor(np.stack([cos, sin])[:, None, :, None].astype(np.float32))

    def _identity(self):
        """The engine's tables where Q and K come rotated: a rotation by nothing."""
        shape = (1, 8 * self.page, 1, self.dim // STYLES[self.style])
        return tensor(np.stack([np.ones(shape), np.zeros(shape)]).astype(np.float32))

    def _buffers(self, requests):
        """The plan's buffers, and the lengths; filled with nonsense."""
        found = {}
        for stage in ("encoder", "decoder", "kv"):
            for name in ("batch_ids", "tile_ids_per_batch"):
                found[f"{stage}_{name}"] = paddle.full([64 * (requests + 1)], -5, "int32")
        names = ("decoder_num_blocks_cpu", "decoder_num_blocks_device")
        for name in (*names, "encoder_num_blocks_x_cpu", "kv_num_blocks_x_cpu"):
            found[name] = paddle.full([1], -5, "int32")
        found["decoder_chunk_size_device"] = paddle.full([1], 64, "int32")
        found["max_len_tensor_cpu"] = paddle.full([9], -5, "int32")
        return found
