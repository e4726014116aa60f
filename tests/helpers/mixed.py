# SPDX-License-Identifier: Apache-2.0
"""A small engine that serves mixed batches through a backend and checks every step in float64.

Layer 1 of three is served; its neighbours are in other formats, and whatever does not belong to a
step's new tokens must keep its bits. Caches are poisoned: NaN where the dtype has one, any byte
otherwise, in pages of nobody as well as behind each request's tokens.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from fastkv import BatchMeta, CacheSpec, Rope
from fastkv.backends import get_backend
from helpers import oracle
from helpers.batches import floats, poison, running_sum, static_scales
from helpers.compare import assert_same_bits, bits
from helpers.sentinels import STATIC, first_index

HEADS, QUERY_HEADS, DIM, PAGE = 2, 6, 16, 4
PADDING = 2
EPS = 2.0**-24
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}
#: Backends whose prefill rows see the new tokens exact and only the prefix quantized.
EXACT_PREFILL = {"append": False, "flash": True, "flash_mask": True}


@dataclass(frozen=True)
class Step:
    """New tokens of one step: `(request, new)`, or `(request, new, kept)` for draft tokens."""

    decode: tuple[tuple[int, ...], ...] = ()
    prefill: tuple[tuple[int, ...], ...] = ()

    @property
    def entries(self):
        return [*self.decode, *self.prefill]

    def is_decode(self, b):
        """Whether an entry is a decode or draft request."""
        return b < len(self.decode)

    def is_gathered(self, b):
        """Whether a gathering backend serves an entry over contiguous keys."""
        return not self.is_decode(b)


#: Prefill, prefill over a cached prefix, decode, several draft tokens of which some are rejected,
#: and empty requests of either kind, with and without a cached prefix.
MIXTURE = (
    Step(prefill=((0, 7), (1, 0), (2, 5))),
    Step(decode=((0, 1), (2, 3, 1), (3, 0)), prefill=((1, 9), (4, 0), (5, 6))),
    Step(decode=((2, 1), (5, 2)), prefill=((1, 4), (3, 3), (0, 2), (4, 1))),
    Step(decode=((0, 1), (2, 0), (3, 4, 2), (1, 1))),
    Step(prefill=((1, 5), (0, 0), (5, 1))),
    Step(decode=((5, 1),), prefill=((0, 0), (4, 0))),
    Step(decode=((1, 0), (3, 0))),
)
PREFILL_ONLY = tuple(Step(prefill=step.prefill) for step in MIXTURE if step.prefill)
DECODE_ONLY = (MIXTURE[0], *(Step(decode=step.decode) for step in MIXTURE if step.decode))


@dataclass
class Seen:
    """What a run was worth: rows compared, and how much the options changed them."""

    rows: int = 0
    changed: float = 0.0  # the largest distance to plain causal attention, in tolerances
    exact: float = 0.0  # the largest distance between exact and quantized reads, in tolerances
    outs: list = field(default_factory=list)


class Engine:
    """One layer's requests, pages and steps.

    Args:
        rng: seeds everything.
        backend: name of the backend.
        fmt: format of the layer.
        rotated: with RoPE and QK-norm; without, K's bytes are exact too.
        norm_after_rope: where the norm stands.
        dtype: of qkv and out.
        ops: None drives `fastkv.ops`.
        options: attributes of the layer.
    """

    heads, query_heads, dim, page, rotary = HEADS, QUERY_HEADS, DIM, PAGE, DIM - 4
    layer_id, scale_dtype, interleaved = 1, "float32", False

    def __init__(
        self,
        rng,
        backend,
        fmt,
        *,
        rotated=True,
        norm_after_rope=False,
        dtype="float32",
        ops=None,
        **options,
    ):
        self.rng, self.fmt, self.dtype, self.rotated = rng, fmt, dtype, rotated
        self.formats = self._formats()
        self.spec = CacheSpec(
            3, self.heads, self.dim, self.page, self.formats, "bfloat16", self.scale_dtype
        )
        self.exact_prefill = EXACT_PREFILL[backend]
        self.backend = get_backend(self.spec, name=backend, ops=ops)
        self.lengths = [0] * 6
        self._allocate()
        self.static = self._static()
        given = {name: getattr(self.static, f) for name, f in STATIC[fmt].items()}
        if "cache_k_zp" not in given:
            given |= {"cache_k_zp": None, "cache_v_zp": None}
        tables = (100.0, self.rotary, 8 * self.page)
        self.rope = Rope.from_theta(*tables, interleaved=self.interleaved) if rotated else None
        if rotated:
            given |= {"rms_norm_eps": 1e-3, "norm_after_rope": norm_after_rope}
            given |= {
                f"{s}_norm_weight": rng.uniform(0.5, 1.5, self.dim).astype("f4") for s in "qk"
            }
        self.layer = SimpleNamespace(
            layer_id=self.layer_id,
            cache_quant_type_str=fmt,
            **(given | {"causal": True} | options),
        )

    def _formats(self):
        return ["block_wise_fp8", self.fmt, "cache_int8"]

    def _static(self):
        return static_scales(self.rng, self.fmt, self.heads, self.dim, largest_zp=3.0)

    def _allocate(self):
        columns, num_pages = 6, 6 * 6 + 4
        ids = self.rng.permutation(num_pages)
        self.table = ids[: 6 * columns].reshape(6, columns).astype(np.int32)
        self.caches = [poison(self.rng, t.shape, t.dtype) for t in self.spec.tensors(num_pages)]
        for cache in self.caches:
            if cache.itemsize == 1:
                cache.view(np.uint8)[ids[6 * columns :]] = 0x7F  # NaN in e4m3

    @property
    def cache(self):
        """The layer's part of the list, found once more by the sum of what is before it."""
        first = first_index(self.formats, self.layer_id)
        last = first_index(self.formats, self.layer_id + 1)
        tensors = [*self.caches[first:last], None, None][:4]
        names = ("k", "v", "k_scale", "v_scale")
        quant = SimpleNamespace(name=SimpleNamespace(value=self.fmt))
        found = dict(zip(names, tensors, strict=True))
        return SimpleNamespace(spec=self.spec, quant=quant, static=self.static, **found)

    def run(self, steps, masked=lambda step: False):
        """Serve the steps, checking each; returns what was seen."""
        seen = Seen()
        for number, step in enumerate(steps):
            self._step(step, number, masked(step), seen)
        assert seen.rows, "no row was compared"
        return seen

    def meta(self, step, number=0, mask_offsets=None):
        """The batch of a step."""
        order = [entry[0] for entry in step.entries]
        cached = np.array([self.lengths[r] for r in order], np.int32)
        new = np.array([entry[1] for entry in step.entries], np.int32)
        decodes = np.arange(len(order)) < len(step.decode)
        # An engine may leave the decode requests out of the contiguous K and V, or not.
        counts = np.where(decodes & (number % 2 == 0), 0, cached + new)
        table = self.table[order].copy()
        used = -(-(cached + new) // self.page)
        table[np.arange(table.shape[1]) >= used[:, None]] = -1
        return BatchMeta(
            caches=self.caches,
            spec=self.spec,
            cu_seqlens_q=running_sum(new),
            cache_seqlens=cached,
            block_table=table,
            cu_seqlens_k=running_sum(counts) if step.prefill else None,
            total_k=int(counts.sum()) if step.prefill else None,
            num_decode=len(step.decode),
            rope=self.rope,
            mask_offsets=mask_offsets,
        )

    def tokens(self, step):
        """Random qkv of a step; NaN in the padding rows."""
        rows = sum(entry[1] for entry in step.entries)
        qkv = floats(
            self.rng, (rows + PADDING, (self.query_heads + 2 * self.heads) * self.dim), self.dtype
        )
        qkv[rows:] = np.nan
        return qkv

    def mask_offsets(self, step):
        """Random intervals, some empty; nonsense in the padding rows."""
        offsets = []
        for entry in step.entries:
            length = self.lengths[entry[0]] + entry[1]
            ends = np.sort(self.rng.integers(0, length + 1, (entry[1], 2)), axis=1)
            ends[self.rng.random(len(ends)) < 0.2] = length
            offsets.append(ends)
        offsets.append(np.full((PADDING, 2), (99, -7)))
        return np.concatenate(offsets).astype(np.int32)

    def _step(self, step, number, masked, seen):
        qkv = self.tokens(step)
        meta = self.meta(step, number, self.mask_offsets(step) if masked else None)
        before = [bits(cache) for cache in self.caches]
        out = self._forward(qkv, meta)
        rows = int(meta.cu_seqlens_q[-1])
        assert out.shape == (rows + PADDING, self.query_heads, self.dim)
        assert out.dtype == qkv.dtype
        assert not out[rows:].any(), "padding rows are 0"
        heads = self._values(qkv).reshape(len(qkv), -1, self.dim)
        for b, entry in enumerate(step.entries):
            own = slice(int(meta.cu_seqlens_q[b]), int(meta.cu_seqlens_q[b + 1]))
            cached = self.lengths[entry[0]]
            q, k, v = self._rotate(heads[own], cached)
            self._check_written(meta.block_table[b], cached, k, v, before)
            intervals = None if meta.mask_offsets is None else meta.mask_offsets[own]
            exact = self.exact_prefill and step.is_gathered(b)
            if entry[1]:
                held = {
                    side: oracle.read_cache(
                        self.cache, side, meta.block_table[b], cached + entry[1]
                    )
                    for side in "kv"
                }
                self._check_rows(out[own], q, k, v, held, intervals, exact, seen)
            self.lengths[entry[0]] += entry[-1]
        for cache, want in zip(self.caches, before, strict=True):
            assert_same_bits(cache, want)  # nothing else was written
        seen.outs.append(out)

    def _forward(self, qkv, meta):
        return self.backend.forward_mixed(qkv, self.layer, meta)

    def _values(self, qkv):
        """Float64 of what is normed, rotated and written."""
        return oracle.values_of(qkv)

    def _rotate(self, heads, cached):
        """Float64 Q, K, V of one request's new tokens, after norm and RoPE."""
        q, k, v = np.split(heads, [self.query_heads, self.query_heads + self.heads], axis=1)
        if not self.rotated:
            return q, k, v
        layer, at = self.layer, slice(cached, cached + len(heads))

        def norm(x, weight):
            return oracle.rms_norm(x, weight, layer.rms_norm_eps)

        def rotate(x):
            return oracle.rope(x, self.rope.cos[at], self.rope.sin[at], self.interleaved)

        if layer.norm_after_rope:
            q, k = norm(rotate(q), layer.q_norm_weight), norm(rotate(k), layer.k_norm_weight)
        else:
            q, k = rotate(norm(q, layer.q_norm_weight)), rotate(norm(k, layer.k_norm_weight))
        return q, k, v

    def _check_written(self, pages, cached, k, v, before):
        """The new tokens are in the cache, quantized; takes them over into `before`."""
        first = first_index(self.formats, self.layer_id)
        length = cached + len(k)
        dtypes = {"dtype": "bfloat16", "scale_dtype": self.scale_dtype}
        for at, (side, x) in enumerate((("k", k), ("v", v))):
            static = self.static
            quant = None if static is None else getattr(static, f"{side}_quant")
            zp = None if static is None else getattr(static, f"{side}_zp")
            stored, scale = oracle.quantize(self.fmt, oracle.f32(x), quant=quant, zp=zp, **dtypes)
            is_exact = side == "v" or not self.rotated
            for j in range(len(x)):
                page, slot = pages[(cached + j) // self.page], (cached + j) % self.page
                for index, bits_of in ((first + at, stored), (first + 2 + at, scale)):
                    if bits_of is None:
                        continue
                    written = bits(self.caches[index][page, :, slot])
                    if is_exact:
                        assert_same_bits(written, bits_of[j])
                    before[index][page, :, slot] = written
            got = oracle.read_cache(self.cache, side, pages, length)[cached:]
            dequant = None if static is None else getattr(static, f"{side}_dequant")
            want = oracle.dequantize(
                self.fmt, stored, dequant=dequant, zp=zp, scale=scale, **dtypes
            )
            assert (np.abs(got - want) <= self._step_at(want, dequant)).all(), f"{side} was stored"

    def _step_at(self, x, dequant):
        """Distance of neighbouring codes: where rounding in float32 may differ from float64."""
        relative = {"none": 2.0**-7, "cache_fp8": 1 / 8, "block_wise_fp8": 1 / 8}
        if self.fmt in relative:
            return relative[self.fmt] * np.abs(x) + 0.01
        return 1.001 * np.asarray(dequant, np.float64).reshape(self.heads, -1)

    def _check_rows(self, out, q, k, v, held, intervals, exact, seen):
        new, length = len(q), len(held["k"])
        sides = held
        if exact:
            sides = {"k": np.concatenate([held["k"][: length - new], k])}
            sides["v"] = np.concatenate([held["v"][: length - new], v])
        options = self._options()
        mask = self._visible(new, length, intervals)
        want, _ = oracle.attention(q, sides["k"], sides["v"], mask, **options)
        allowed = self._tolerance(q, sides["k"], sides["v"], want, options)
        off = np.abs(oracle.values_of(out) - want)
        assert (off <= allowed).all(), f"off by {(off / allowed).max():.3g} tolerances"
        assert not out[~mask.any(axis=1)].any(), "a row that sees no key is exactly 0"
        seen.rows += new
        plain = oracle.visible_mask(new, length, True)
        scale = {"scale": self.dim**-0.5}
        other, _ = oracle.attention(q, sides["k"], sides["v"], plain, **scale)
        seen.changed = max(seen.changed, float((np.abs(other - want) / allowed).max()))
        read, _ = oracle.attention(q, held["k"], held["v"], mask, **options)
        seen.exact = max(seen.exact, float((np.abs(read - want) / allowed).max()))

    def _visible(self, new, length, intervals):
        window = getattr(self.layer, "sliding_window", None)
        return oracle.visible_mask(new, length, self.layer.causal, window, intervals)

    def _options(self):
        scale = getattr(self.layer, "softmax_scale", None)
        return {
            "scale": self.dim**-0.5 if scale is None else scale,
            "soft_cap": getattr(self.layer, "soft_cap", None),
            "sinks": getattr(self.layer, "sinks", None),
        }

    def _tolerance(self, q, k, v, want, options):
        """What float32 arithmetic on these values may be off by.

        An element of q or k carries at most 16 EPS of norm and rotation, the dot product D more
        and dequantization 2; with |q| |k| over the sum of |q k| that bounds the error of a score
        `s`. Weights err by twice that relative to themselves, and by exp and the sum over L keys;
        a sink's share once more. Below float32, q and the gathered K and V are rounded once each.
        """
        unit = ROUNDING[self.dtype]
        rounded = 0.0 if self.dtype == "float32" else unit
        norms = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
        score = options["scale"] * norms * ((32 + self.dim + 2) * EPS + 2 * rounded)
        score += 8 * EPS * (options["soft_cap"] or 0)
        weight = 4 * score + 4 * (len(k) + 8) * EPS
        return (weight + 2 * EPS + rounded) * np.abs(v).max() + unit * np.abs(want)
