# SPDX-License-Identifier: Apache-2.0
"""The whole text of each kind of refusal of the contracts, as a caller reads it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fastkv import Rope, ops
from fastkv.contracts.presence import require_static
from fastkv.errors import ContractError
from fastkv.quant import quant_spec
from fastkv.scales.bundle import FIELDS
from helpers.calls import legal_call

OTHER = np.zeros((7, 3), np.float32)


def read_only(name):
    def change(call):
        call[name].flags.writeable = False
        return call[name]

    return change


# Op, format and what is changed -> the text.
TEXTS = [
    # presence
    ("rope_write_kv", None, "cache", None, "a LayerCache", "None"),
    ("gather_kv", None, "cache", [], "a LayerCache", "list"),
    ("rope_write_kv", "none", "qkv", None, "a tensor [T, (Hq + 2*Hkv) * D]", "None"),
    ("rope_write_kv", "none", "cu_seqlens_q", None, "an int32 tensor [B+1]", "None"),
    ("rope_write_kv", "cache_int8", "cache_seqlens", None, "an int32 tensor [B]", "None"),
    ("rope_write_kv", "cache_int8", "block_table", None, "an int32 tensor [B, M]", "None"),
    (
        "rope_write_kv",
        "cache_int8",
        "out_v",
        None,
        "out_k, out_v and cu_seqlens_k together, or none of them",
        "None",
    ),
    ("gather_kv", "cache_fp8", "out_k", None, "a tensor", "None"),
    ("paged_attention", "cache_fp8", "q", None, "a tensor", "None"),
    ("masked_attention", None, "k", None, "a tensor", "None"),
    ("merge_states", None, "lse_b", None, "a tensor", "None"),
    ("copy_pages", "cache_int8", "src", None, "page ids, int32 [n]", "None"),
    ("rope_write_kv", "none", "cache.k", None, "a cache tensor [N, Hkv, P, D_storage]", "None"),
    (
        "rope_write_kv",
        "block_wise_fp8",
        "cache.v_scale",
        None,
        "dequant multipliers [N, Hkv, P]",
        "None",
    ),
    (
        "rope_write_kv",
        "cache_int8",
        "cache.k_scale",
        OTHER,
        "None: the format pages no scales",
        "ndarray of shape [7, 3]",
    ),
    (
        "rope_write_kv",
        "none",
        "cache.static",
        OTHER,
        "None: the format has no scales",
        "ndarray of shape [7, 3]",
    ),
    (
        "rope_write_kv",
        "block_wise_fp8",
        "cache.static",
        3,
        "None: the format has dynamic scales, paged in the cache",
        "int",
    ),
    ("gather_kv", "cache_int8", "cache.static", None, "StaticScales of the layer", "None"),
    ("rope_write_kv", "none", "rope.cos", None, "a float32 table", "None"),
    # dtypes
    ("rope_write_kv", "none", "rope", OTHER, "a fastkv.Rope or None", "ndarray"),
    (
        "paged_attention",
        "none",
        "q",
        np.zeros((7, 6, 64)),
        "bfloat16 or float16 or float32",
        "float64",
    ),
    ("paged_attention", "cache_int8", "cu_seqlens_q", np.zeros(3), "int32", "float64"),
    ("gather_kv", "cache_fp8", "cache.k", OTHER, "float8_e4m3fn or uint8", "float32"),
    ("gather_kv", "cache_int4_zp", "cache.k", OTHER, "uint8", "float32"),
    (
        "gather_kv",
        "block_wise_fp8",
        "cache.k_scale",
        OTHER.astype(np.float16),
        "float32",
        "float16",
    ),
    (
        "gather_kv",
        "cache_int8",
        "cache.static.k_quant",
        OTHER.astype(int),
        "bfloat16 or float16 or float32",
        "int64",
    ),
    ("merge_states", None, "out_b", np.zeros((7, 6, 64), np.float16), "float32", "float16"),
    # shapes
    (
        "rope_write_kv",
        "none",
        "qkv",
        OTHER,
        "[T, (Hq + 2*Hkv) * D] with Hkv = 2, D = 64, Hq a multiple of Hkv",
        "[7, 3]",
    ),
    (
        "rope_write_kv",
        "none",
        "qkv",
        np.zeros((7, 9 * 64), np.float32),
        "[T, (Hq + 2*Hkv) * D] with Hkv = 2, D = 64, Hq a multiple of Hkv",
        "[7, 576]",
    ),
    ("rope_write_kv", "none", "cu_seqlens_q", np.zeros(4, np.int32), "[B+1] = [3]", "[4]"),
    ("rope_write_kv", "none", "block_table", np.zeros(2, np.int32), "[B, M] = [2, ?]", "[2]"),
    ("rope_write_kv", "none", "rope.sin", OTHER, "[max_len, rotary_dim/2] = [22, 32]", "[7, 3]"),
    ("rope_write_kv", "none", "q_norm_weight", OTHER[:, 0], "[D] = [64]", "[7]"),
    (
        "paged_attention",
        "cache_int8",
        "q",
        np.zeros((7, 3, 64), np.float32),
        "D > 0 and Hq > 0, a multiple of Hkv = 2",
        "Hq = 3, D = 64",
    ),
    (
        "paged_attention",
        "cache_int8",
        "mask_offsets",
        np.zeros((7, 3), np.int32),
        "[T, 2] = [7, 2]",
        "[7, 3]",
    ),
    ("masked_attention", None, "v", OTHER[None], "[Tk, Hkv, D] = [29, 2, 64]", "[1, 7, 3]"),
    ("masked_attention", None, "sinks", OTHER[:5, 0], "[Hq] = [6]", "[5]"),
    (
        "gather_kv",
        "cache_int8",
        "cache.v",
        np.zeros((9, 2, 16, 32), np.int8),
        "[N, Hkv, P, D_storage] = [6, 2, 16, 64]",
        "[9, 2, 16, 32]",
    ),
    ("gather_kv", "block_wise_fp8", "cache.v_scale", OTHER, "[N, Hkv, P] = [6, 2, 16]", "[7, 3]"),
    (
        "gather_kv",
        "cache_int8",
        "cache.static.k_quant",
        OTHER,
        "[Hkv] = [2] or [Hkv, D] = [2, 64] or [Hkv * D] = [128]",
        "[7, 3]",
    ),
    ("gather_kv", "cache_fp8", "cache.static.k_quant", OTHER, "[Hkv] = [2]", "[7, 3]"),
    (
        "gather_kv",
        "cache_int4_zp",
        "cache.static.v_zp",
        OTHER,
        "[Hkv, D] = [2, 64] or [Hkv * D] = [128]",
        "[7, 3]",
    ),
    ("copy_pages", "cache_int8", "dst", np.zeros(2, np.int32), "[n] = [3]", "[2]"),
    # what is written
    (
        "paged_attention",
        "none",
        "out",
        read_only("out"),
        "writeable memory, one place an element",
        "memory that is read-only or overlaps itself",
    ),
    (
        "copy_pages",
        "cache_int8",
        "cache.v",
        read_only("cache.v"),
        "writeable memory, one place an element",
        "memory that is read-only or overlaps itself",
    ),
    # numbers
    ("rope_write_kv", "none", "norm_eps", -1.0, "a finite number of at least 0", "-1.0"),
    ("paged_attention", "cache_int8", "scale", float("inf"), "None or a finite number", "inf"),
    ("paged_attention", "cache_int8", "window", 0, "None or an integer of at least 1", "0"),
    ("masked_attention", None, "soft_cap", 0.0, "None or a finite number above 0", "0.0"),
]


@pytest.mark.parametrize(("op", "fmt", "argument", "value", "expected", "got"), TEXTS)
def test_text(op, fmt, argument, value, expected, got):
    call = legal_call(op, fmt or "none")
    call[argument] = value(call) if callable(value) else value
    in_format = "" if fmt is None else f" (format {fmt})"
    want = f"{op}: {argument}{in_format}: expected {expected}, got {got}"
    assert str(call.raises(ContractError)) == want


def test_text_of_a_rotary_dim():
    call = legal_call("rope_write_kv")
    call["rope"] = Rope(OTHER[:, :0], OTHER[:, :0])
    assert str(call.raises(ContractError)) == (
        "rope_write_kv: rope.cos (format cache_int8): expected [max_len, rotary_dim/2] with "
        "0 < rotary_dim <= D = 64, got rotary_dim 0"
    )


STEP_TEXTS = [
    ("cache", None, "mine: cache: expected a LayerCache, got None"),
    (
        "sinks",
        OTHER[:5, 0],
        "mine: sinks (format cache_int8): expected [Hq] = [6], got [5]",
    ),
    (
        "mask_offsets",
        np.zeros((7, 3), np.int32),
        "mine: mask_offsets (format cache_int8): expected [T, 2] = [7, 2], got [7, 3]",
    ),
    (
        "cu_seqlens_k",
        np.zeros(4, np.int32),
        "mine: cu_seqlens_k (format cache_int8): expected [B+1] = [3], got [4]",
    ),
    (
        "block_table",
        np.zeros(2),
        "mine: block_table (format cache_int8): expected int32, got float64",
    ),
]


@pytest.mark.parametrize(("argument", "value", "text"), STEP_TEXTS)
def test_text_of_a_step(argument, value, text):
    call = legal_call("rope_write_kv")
    names = ("qkv", "cache", "cu_seqlens_q", "cache_seqlens", "block_table", "cu_seqlens_k")
    arguments = {name: call[name] for name in names}
    ops.check_step("mine", **arguments)
    with pytest.raises(ContractError) as caught:
        ops.check_step("mine", **(arguments | {argument: value}))
    assert str(caught.value) == text


def test_text_of_a_bundle():
    cache = legal_call("gather_kv").arguments["cache"]
    static = replace(cache.static, k_quant=OTHER)
    with pytest.raises(ContractError) as caught:
        static.validate(cache.spec)
    assert str(caught.value) == (
        "StaticScales.validate(layer_id=0): static.k_quant (format cache_int8): expected "
        "[Hkv] = [2] or [Hkv, D] = [2, 64] or [Hkv * D] = [128], got [7, 3]"
    )


def test_one_head_of_everything_is_legal():
    call = legal_call("rope_write_kv", "none", kv_heads=1, group=1)
    assert call.run().shape == (7, 1, 64)


@pytest.mark.parametrize("op", ["paged_attention", "masked_attention"])
@pytest.mark.parametrize(("name", "value"), [("window", 1), ("soft_cap", 0.001), ("scale", -0.5)])
def test_the_least_of_what_is_legal(op, name, value):
    call = legal_call(op)
    call[name] = value
    out, _ = call.run()
    assert out.shape == (7, 6, 64)


def test_an_epsilon_of_0_is_legal():
    call = legal_call("rope_write_kv")
    call["norm_eps"] = 0
    assert call.run().shape == (7, 6, 64)


def test_a_size_of_0_is_a_size_and_not_unknown():
    call = legal_call("masked_attention")
    call["k"], call["v"] = np.zeros((0, 2, 64), np.float32), np.zeros((0, 2, 63), np.float32)
    assert str(call.raises(ContractError)) == (
        "masked_attention: v: expected [Tk, Hkv, D] = [0, 2, 64], got [0, 2, 63]"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(f"{s}_{what}", "a multiplier") for s in "kv" for what in ("quant", "dequant")],
        *[(f"{side}_zp", "a zero point [Hkv, D]") for side in "kv"],
    ],
)
def test_text_of_half_a_bundle(name, expected):
    # `StaticScales` refuses to be one; what stands in for it may not.
    static = SimpleNamespace(**(dict.fromkeys(FIELDS, OTHER) | {name: None}))
    with pytest.raises(ContractError) as caught:
        require_static("load", "bundle", static, quant_spec("cache_int4_zp"))
    want = f"load: bundle.{name} (format cache_int4_zp): expected {expected}, got None"
    assert str(caught.value) == want
