# SPDX-License-Identifier: Apache-2.0
"""Float64 attention over the unquantized K and V, and the error that a format's step predicts.

Rounding to codes that are `step` apart leaves an error of variance step²/12. To first order in the
errors of K and V, a row with weights p and output o is off by

    sum_j p_j dv_j + sum_j p_j (scale * q.dk_j) (v_j - o)

and with errors that are independent of each other its expected square is

    sum_j p_j² |sigma_vj|² + sum_j p_j² scale² (sum_d q_d² sigma_kjd²) |v_j - o|².

Values beyond a static range are off by what is cut, which enters as a variance too. `docs/demo.md`
has the derivation and how well it meets what is measured.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from fastkv.demo.sample import Sample, SampleLayer
from fastkv.demo.schedule import Request
from fastkv.quant import QuantSpec
from fastkv.scales import StaticScales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Truth:
    """One layer and request in float64.

    Attributes:
        q: `[L, Hkv, G, D]`, rotated.
        k: `[L, Hkv, D]`, rotated.
        v: `[L, Hkv, D]`.
        weights: `[Hkv, G, L, L]`, the softmax, 0 above the diagonal.
        out: `[L, Hkv, G, D]`.
    """

    q: "F64"
    k: "F64"
    v: "F64"
    weights: "F64"
    out: "F64"


def truth(sample: Sample, layer: SampleLayer, request: Request) -> Truth:
    """Causal attention of one request, in float64 from the projections on."""
    heads, dim = sample.num_kv_heads, sample.head_dim
    rows = layer.qkv[request.tokens].astype(np.float64).reshape(len(request.tokens), -1, dim)
    q, k, v = np.split(rows, [sample.num_q_heads, sample.num_q_heads + heads], axis=1)
    q, k = _rotate(q, sample.rope_theta), _rotate(k, sample.rope_theta)
    grouped = q.reshape(len(q), heads, -1, dim)
    scores = np.einsum("ihgd,jhd->hgij", grouped, k) / np.sqrt(dim)
    scores[..., ~np.tri(len(q), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return Truth(grouped, k, v, weights, np.einsum("hgij,jhd->ihgd", weights, v))


def _rotate(x: "F64", theta: float) -> "F64":
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    one, two = x[..., :half], x[..., half:]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def expected_square(
    exact: Truth, quant: QuantSpec, static: StaticScales | None, exact_from: "NDArray[np.int64]"
) -> "F64":
    """Expected squared error of each row and head, `[L, Hkv, G]`.

    Args:
        exact: the attention without quantization.
        quant: the format.
        static: its scales.
        exact_from: `[L]`, see `Request.exact_from`.
    """
    k_var = _variance(exact.k, quant, static, "k")
    v_var = _variance(exact.v, quant, static, "v")
    length, _, _, dim = exact.q.shape
    score_var = np.einsum("ihgd,jhd->hgij", exact.q**2, k_var) / dim
    distance = (
        (exact.v**2).sum(-1).T[:, None, None, :]
        - 2 * np.einsum("jhd,ihgd->hgij", exact.v, exact.out)
        + (exact.out**2).sum(-1).transpose(1, 2, 0)[..., None]
    )
    quantized = np.arange(length)[None, :] < exact_from[:, None]
    per_key = v_var.sum(-1).T[:, None, None, :] + score_var * distance
    squares: F64 = (exact.weights**2 * per_key * quantized).sum(-1)
    by_row: F64 = squares.transpose(2, 0, 1)
    return by_row


def _variance(x: "F64", quant: QuantSpec, static: StaticScales | None, side: str) -> "F64":
    """Variance of the rounding error of each element of K or V, from the format's step."""
    if quant.bound is None:
        step = _float_step(x, mantissa=7, least_exponent=-126)
        # The sample is bfloat16: what was not rotated is stored as it is.
        return np.where(x == x.astype(ml_dtypes.bfloat16).astype(np.float64), 0, step**2 / 12)
    step, low, high = _grid(x, quant, static, side)
    cut = np.maximum(x - high, 0) + np.maximum(low - x, 0)
    variance: F64 = step**2 / 12 + cut**2
    return variance


def _grid(
    x: "F64", quant: QuantSpec, static: StaticScales | None, side: str
) -> "tuple[F64, F64, F64]":
    """The step at each element and the range of the codes, in units of x."""
    assert quant.code_min is not None, "only `none` has no codes"
    assert quant.code_max is not None, "only `none` has no codes"
    zp: Any = 0.0
    if static is None:
        dequant = np.abs(x).max(axis=-1, keepdims=True) / quant.code_max
    else:
        heads = x.shape[1]
        dequant = np.asarray(getattr(static, f"{side}_dequant"), np.float64).reshape(heads, -1)
        if quant.needs_zp:
            zp = np.asarray(getattr(static, f"{side}_zp"), np.float64).reshape(heads, -1)
    low, high = (quant.code_min - zp) * dequant, (quant.code_max - zp) * dequant
    is_float = (quant.storage or "").startswith("float")
    unit = _float_step(x / dequant, mantissa=3, least_exponent=-6) if is_float else 1.0
    return unit * dequant, low, high


def _float_step(x: "F64", mantissa: int, least_exponent: int) -> "F64":
    """Distance of neighbouring floats at |x|."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**least_exponent)))
    step: F64 = np.exp2(exponent - mantissa)
    return step
