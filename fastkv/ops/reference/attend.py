# SPDX-License-Identifier: Apache-2.0
"""The attention of one request's query rows, shared by the paged and the contiguous op."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    I64 = NDArray[np.int64]
    Mask = NDArray[np.bool_]

# Scores held at once, in elements: 64 MiB of float32.
_SCORES = 1 << 24


class KeySource(Protocol):
    """Keys and values of one request."""

    length: int
    chunk: int
    heads: int

    def read(self, side: str, start: int, stop: int) -> "F32":
        """Float32 `[Hkv, stop - start, D]` of side `k` or `v`; `start` begins a chunk."""

    def present(self, start: int, stop: int) -> "Mask | None":
        """Which keys exist at all; None when all do."""


class Softmax(NamedTuple):
    """What shapes the softmax: factor of q.k, cap of the logits, sinks `[Hq]`."""

    scale: float
    soft_cap: float | None
    sinks: "NDArray[np.float32] | None"

    @classmethod
    def of(
        cls,
        scale: float | None,
        head_dim: int,
        soft_cap: float | None,
        sinks: "NDArray[np.float32] | None",
    ) -> "Softmax":
        """With the usual factor, `1 / sqrt(D)`, where none is given."""
        return cls(head_dim**-0.5 if scale is None else scale, soft_cap, sinks)


def visible(
    rows: int,
    length: int,
    causal: bool,
    window: int | None,
    intervals: "NDArray[np.int32] | None",
) -> "tuple[I64, I64]":
    """The keys `[low, high)` that each row of a request sees.

    The request's rows stand at the end of its `length` keys.
    """
    position = np.arange(rows, dtype=np.int64) + (length - rows)
    low = np.zeros(rows, np.int64)
    if window is not None:
        low = np.maximum(position - min(window, length) + 1, 0)
    high = np.clip(position + 1, 0, length) if causal else np.full(rows, length, np.int64)
    if intervals is not None:
        low = np.maximum(low, intervals[:, 0])
        high = np.minimum(high, intervals[:, 1])
    return low, high


def attend(
    q: "F32", keys: KeySource, low: "I64", high: "I64", softmax: Softmax
) -> "tuple[F32, F32]":
    """Attention of query rows over keys `[low, high)` each.

    Args:
        q: float32 `[n, Hq, D]`.
        keys: K and V of the request.
        low: `[n]`, first key that a row sees.
        high: `[n]`, end of the keys that a row sees.
        softmax: scale, cap and sinks.

    Returns:
        `out [n, Hq, D]` and `lse [n, Hq]`, float32.
    """
    out = np.zeros(q.shape, np.float32)
    lse = np.full(q.shape[:2], -np.inf, np.float32)
    tile = max(1, _SCORES // max(1, q.shape[1] * keys.length))
    for start in range(0, len(q), tile):
        rows = slice(start, start + tile)
        seen = low[rows] < high[rows]
        if seen.any():
            _attend_tile(q[rows], keys, low[rows], high[rows], softmax, out[rows], lse[rows])
    return out, lse


def _attend_tile(
    q: "F32",
    keys: KeySource,
    low: "I64",
    high: "I64",
    softmax: Softmax,
    out: "F32",
    lse: "F32",
) -> None:
    """One tile of rows, with all their scores at once; writes `out` and `lse`."""
    seen = low < high
    first, last = int(low[seen].min()), int(high[seen].max())
    first -= first % keys.chunk
    heads = keys.heads
    rows, query_heads, dim = q.shape
    grouped = q.reshape(rows, heads, -1, dim).transpose(1, 0, 2, 3).reshape(heads, -1, dim)
    scores = _scores(grouped, keys, first, last, softmax)
    mask = _mask(keys, low, high, first, last)
    by_row = scores.reshape(heads, rows, -1, last - first)
    if mask is not None:
        np.copyto(by_row, -np.inf, where=~mask[None, :, None, :])
    top = scores.max(axis=-1, keepdims=True)
    top[np.isneginf(top)] = 0  # an empty row: exp(-inf - 0) is 0, where -inf - -inf is NaN
    np.subtract(scores, top, out=scores)
    weights = np.exp(scores, out=scores)
    total = weights.sum(axis=-1, keepdims=True)
    summed = _weigh(weights, mask, keys, first, last, rows)
    found = np.where(total > 0, summed / total, np.where(np.isnan(total), total, 0))

    def per_row(x: "F32") -> "F32":
        grouped_back = x.reshape(heads, rows, -1, x.shape[-1]).transpose(1, 0, 2, 3)
        return grouped_back.reshape(rows, query_heads, -1)

    lse[...] = per_row(top + np.log(total))[..., 0]
    out[...] = per_row(found)
    if softmax.sinks is not None:
        # 1 / (1 + exp(sink - lse)) is the share of the keys in a denominator that has the sink.
        share = 1 / (1 + np.exp(softmax.sinks[None, :] - lse))
        out *= np.where(np.isneginf(lse), 0, share)[..., None]


def _scores(grouped: "F32", keys: KeySource, first: int, last: int, softmax: Softmax) -> "F32":
    scores = np.empty((*grouped.shape[:2], last - first), np.float32)
    for start in range(first, last, keys.chunk):
        stop = min(start + keys.chunk, last)
        k = keys.read("k", start, stop)
        scores[..., start - first : stop - first] = grouped @ k.transpose(0, 2, 1)
    scores *= np.float32(softmax.scale)
    if softmax.soft_cap is not None:
        cap = np.float32(softmax.soft_cap)
        scores = cap * np.tanh(scores / cap)
    return scores


def _mask(keys: KeySource, low: "I64", high: "I64", first: int, last: int) -> "Mask | None":
    """`[n, last - first]` booleans; None when every row sees every key."""
    present = keys.present(first, last)
    if present is None and (low <= first).all() and (high >= last).all():
        return None
    at = np.arange(first, last)
    mask = (at >= low[:, None]) & (at < high[:, None])
    return mask if present is None else mask & present


def _weigh(
    weights: "F32", mask: "Mask | None", keys: KeySource, first: int, last: int, rows: int
) -> "F32":
    """`weights @ V`; a key that a row may not see adds nothing to it, be it NaN or inf."""
    summed = np.zeros((1, 1, 1), np.float32)
    for start in range(first, last, keys.chunk):
        stop = min(start + keys.chunk, last)
        v = keys.read("v", start, stop)
        part = weights[..., start - first : stop - first]
        added = part @ v
        if mask is not None and not np.isfinite(added).all():
            added = _weigh_visible(part, mask[:, start - first : stop - first], v, rows)
        summed = summed + added
    return summed


def _weigh_visible(part: "F32", mask: "Mask", v: "F32", rows: int) -> "F32":
    """`part @ v` where V is not finite somewhere: 0 * NaN must not reach a row blind to it."""
    finite: Mask = np.isfinite(v).all(axis=(0, 2), keepdims=True).reshape(-1)
    added = part @ np.where(finite[:, None], v, 0)
    group = part.shape[1] // rows
    for key in np.flatnonzero(~finite):
        sees = np.repeat(mask[:, key], group)[None, :, None]
        added += np.where(sees, part[..., key, None] * v[:, None, key], 0)
    return added
