# SPDX-License-Identifier: Apache-2.0
"""Arguments that several ops of the engine take, as fastkv's take them."""

from typing import Any

from fastkv.arrays import ArrayInfo
from fastkv.dtypes import FLOATS
from fastkv.errors import MissingTensorError, ShapeError
from fastkv.integrations.fastdeploy.tensors import described, require_dtype, require_shape


def norm_arguments(
    op: str,
    q_norm_weight: Any,
    k_norm_weight: Any,
    rms_norm_eps: Any,
    fmt: str,
) -> dict[str, Any]:
    """What `rope_write_kv` takes of the norm: after RoPE, and of Q and K or of neither."""
    weights = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    absent = [name for name, weight in weights.items() if weight is None]
    if len(absent) == 1:
        raise MissingTensorError(
            op, absent[0], format=fmt, expected="both norm weights or neither", got="None"
        )
    return {**weights, "norm_eps": rms_norm_eps, "norm_after_rope": True}


def float32_sinks(op: str, sinks: Any, fmt: str | None) -> Any:
    """The sinks in float32; the engine keeps them in the model's dtype."""
    if sinks is None:
        return None
    info = described(op, "sinks", sinks, "a tensor [Hq]", fmt)
    require_dtype(op, "sinks", info, FLOATS, fmt)
    return sinks if info.dtype == "float32" else sinks.astype("float32")


def describe_qkv(op: str, qkv: Any, fmt: str | None) -> ArrayInfo:
    """The description of qkv, which has two dimensions and a float dtype."""
    expected = "a tensor [T, (Hq + 2*Hkv) * D]"
    info = described(op, "qkv", qkv, expected, fmt)
    require_dtype(op, "qkv", info, FLOATS, fmt)
    if len(info.shape) != 2:
        raise ShapeError(op, "qkv", format=fmt, expected=expected, got=str(list(info.shape)))
    return info


def add_bias(op: str, qkv: Any, bias: Any, fmt: str, argument: str = "qkv_bias") -> Any:
    """Qkv plus bias, in a tensor of its own; qkv itself where there is none."""
    info = describe_qkv(op, qkv, fmt)
    if bias is None:
        return qkv
    found = described(op, argument, bias, "a tensor [(Hq + 2*Hkv) * D]", fmt)
    require_dtype(op, argument, found, FLOATS, fmt)
    require_shape(op, argument, found, info.shape[1:], fmt)
    # In float32, which rounds once; Paddle cannot add 16-bit numbers on the CPU.
    return (qkv.astype("float32") + bias.astype("float32")).astype(qkv.dtype)
