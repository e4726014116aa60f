# SPDX-License-Identifier: Apache-2.0
"""Each thing that a row of kernels does not serve, whole: argument, expected, got and reason."""

from types import MappingProxyType

import pytest

from fastkv import CacheSpec
from fastkv.backends import get_backend, kernels, select_backend
from fastkv.backends.kernels import Device, Kernels, Lack, kernel_refusals, lacks
from fastkv.errors import ContractError

H100 = Device("cuda", 90)
OLD = Device("cuda", 75)
ROW = Kernels(
    name="some",
    kind="cuda",
    min_sm=80,
    min_sm_by_storage={"float8_e4m3fn": 89},
    head_dims=(64, 128),
    page_sizes=(16, 32),
    groups=range(2, 9),
    storage=("int8", "float8_e4m3fn"),
)
ANY = Kernels(name="any", kind="cpu")


def too_old(sm, device, what=""):
    reason = f"{what}needs sm_{sm} or newer, the device is {device}"
    return Lack("device", f"sm_{sm} or newer", device, reason)


# --- lacks ------------------------------------------------------------------------------------


def test_a_cache_that_is_served_lacks_nothing():
    asked = {"head_dim": 64, "page_size": 32, "storage": ["int8", "float8_e4m3fn"], "group": 2}
    assert lacks(ROW, H100, **asked) == []
    assert lacks(ROW, H100) == []


def test_a_row_that_limits_nothing_lacks_nothing():
    asked = {"head_dim": 7, "page_size": 3, "storage": ["float32"], "group": 99}
    assert lacks(ANY, Device("cpu"), **asked) == []


def test_a_device_that_is_too_old():
    assert lacks(ROW, OLD) == [too_old(80, "cuda (sm_75)")]
    assert lacks(ROW, Device("cuda", 79)) == [too_old(80, "cuda (sm_79)")]
    assert lacks(ROW, Device("cuda", 80)) == []


def test_a_device_that_is_too_old_for_a_dtype():
    found = lacks(ROW, Device("cuda", 88), storage=["float8_e4m3fn"])
    assert found == [too_old(89, "cuda (sm_88)", "float8_e4m3fn ")]
    assert lacks(ROW, Device("cuda", 89), storage=["float8_e4m3fn"]) == []


def test_a_device_without_a_number_is_older_than_any():
    row = Kernels(name="one", kind="cpu", min_sm=1)
    assert lacks(row, Device("cpu")) == [too_old(1, "cpu")]


def test_a_head_dim():
    reason = "head dim 96 is none of 64, 128"
    assert lacks(ROW, H100, head_dim=96) == [Lack("head_dim", "one of 64, 128", "96", reason)]


def test_a_page_size():
    reason = "page size 8 is none of 16, 32"
    assert lacks(ROW, H100, page_size=8) == [Lack("page_size", "one of 16, 32", "8", reason)]


@pytest.mark.parametrize("group", [1, 9])
def test_query_heads(group):
    reason = f"{group} query heads a KV head are outside 2 to 8"
    assert lacks(ROW, H100, group=group) == [
        Lack("query heads a KV head", "2 to 8", f"{group}", reason)
    ]


def test_a_dtype_is_named_once():
    lack = Lack("dtype", "one of int8, float8_e4m3fn", "float32", "no float32 cache")
    assert lacks(ROW, H100, storage=["float32", "int8", "float32"]) == [lack]


def test_all_at_once_in_order():
    asked = {"head_dim": 1, "page_size": 2, "storage": ["float8_e4m3fn", "uint8"], "group": 0}
    found = lacks(ROW, OLD, **asked)
    assert [lack.argument for lack in found] == [
        "device",
        "head_dim",
        "page_size",
        "query heads a KV head",
        "device",
        "dtype",
    ]


# --- a row and a spec -------------------------------------------------------------------------


def test_a_spec_is_asked_about_whole():
    spec = CacheSpec(2, 3, 96, 64, ["none", "cache_fp8"], "float16")
    row, reasons = kernel_refusals({"some": ROW}, spec, OLD, 27)
    assert row is ROW
    assert reasons == [
        "needs sm_80 or newer, the device is cuda (sm_75)",
        "head dim 96 is none of 64, 128",
        "page size 64 is none of 16, 32",
        "9 query heads a KV head are outside 2 to 8",
        "no float16 cache",
        "float8_e4m3fn needs sm_89 or newer, the device is cuda (sm_75)",
    ]


def test_query_heads_that_nobody_named_are_not_asked_about():
    spec = CacheSpec(1, 3, 64, 16, "cache_int8")
    assert kernel_refusals({"any": ANY, "some": ROW}, spec, H100) == (ROW, [])


def test_a_kind_of_device_without_kernels():
    spec = CacheSpec(1, 3, 64, 16, "cache_int8")
    assert kernel_refusals({"some": ROW}, spec, Device("cpu")) == (
        None,
        ["no kernels for a cpu device"],
    )


# --- query heads ------------------------------------------------------------------------------


def one_head(heads=1):
    return CacheSpec(1, heads, 64, 16, "cache_int8")


def test_one_query_head_of_one_kv_head_is_served():
    assert select_backend("append", one_head(), num_query_heads=1).backend == "append"
    assert get_backend(one_head(), name="append", num_query_heads=1).name == "append"


@pytest.mark.parametrize(("count", "heads"), [(0, 1), (-1, 1), (3, 2), ("2", 2), (True, 1)])
def test_the_text_about_query_heads(count, heads):
    with pytest.raises(ContractError) as caught:
        select_backend("append", one_head(heads), num_query_heads=count)
    assert str(caught.value) == (
        "select_backend: num_query_heads: "
        f"expected None or a multiple of the {heads} KV heads, got {count!r}"
    )


# --- the table --------------------------------------------------------------------------------


def test_the_text_of_the_table(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", MappingProxyType({"any": ANY, "some": ROW}))
    assert kernels.markdown_table().splitlines() == [
        "| kernels | device | head dims | page sizes | query heads a KV head | stored dtypes |",
        "|---|---|---|---|---|---|",
        "| `any` | cpu | any | any | any | any |",
        "| `some` | sm_80 or newer | 64, 128 | 16, 32 | 2 to 8 "
        "| int8, float8_e4m3fn (from sm_89) |",
    ]
