# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from fastkv import errors
from fastkv.engine_config import ModelConfig
from fastkv.plan import GIB, CapacityError, Memory, plan
from fastkv.quant import QUANT_SPECS, Granularity, QuantType

LLAMA_8B = ModelConfig(32, 8, 128)
LLAMA_70B = ModelConfig(80, 8, 128)

# By hand: 2 (K, V) x 32 layers x 8 heads x 128 = 65536 elements a token; block_wise_fp8 has 2 x 32
# x 8 float32 scales beside them. Static: 4 multipliers, or 4 and 2 zero points, of 32 layers in
# float32, a head or a channel each.
TOKEN = {
    "none": 131072,
    "cache_int8": 65536,
    "cache_fp8": 65536,
    "cache_int4_zp": 32768,
    "block_wise_fp8": 65536 + 2048,
}
STATIC = {
    "none": 0,
    "cache_int8": 4 * 32 * 8 * 4,
    "cache_fp8": 4 * 32 * 8 * 4,
    "cache_int4_zp": 6 * 32 * 8 * 128 * 4,
    "block_wise_fp8": 0,
}


def rows(*arguments, **options):
    return {row.format: row for row in plan(*arguments, **options).rows}


def test_every_format_has_a_row_in_the_order_of_the_table():
    assert [row.format for row in plan(LLAMA_8B).rows] == list(QUANT_SPECS)


def test_bytes_of_llama_3_8b_by_hand():
    got = rows(LLAMA_8B)
    assert {name: row.bytes_per_token for name, row in got.items()} == TOKEN
    assert {name: row.static_bytes for name, row in got.items()} == STATIC
    assert got["none"].compression == 1
    assert got["cache_int4_zp"].compression == 4
    assert got["block_wise_fp8"].compression == pytest.approx(64 / 33)
    assert got["none"].request_bytes == {4096: GIB // 2, 32768: 4 * GIB, 131072: 16 * GIB}


def test_capacity_of_llama_3_8b_by_hand():
    # 80 GiB x 0.9 - 15 GiB = 57 GiB: 7296 bf16 pages of 8 MiB, and 114 requests of half a GiB.
    planned = plan(LLAMA_8B, memory=Memory(80 * GIB, 15 * GIB, 0.9))
    assert planned.cache_bytes == 57 * GIB
    row = planned.rows[0]
    assert (row.pages, row.tokens) == (7296, 466944)
    assert row.requests == {4096: 114, 32768: 14, 131072: 3}
    # int4: 29184 pages of 2 MiB, less one for the 768 KiB of multipliers and zero points.
    int4 = planned.rows[3]
    assert (int4.pages, int4.requests) == (29183, {4096: 455, 32768: 56, 131072: 14})


@pytest.mark.parametrize("seed", range(8))
def test_bytes_are_those_of_tensors_really_allocated(seed):
    rng = np.random.default_rng(seed)
    layers, heads, page = (int(rng.integers(1, high)) for high in (5, 4, 40))
    dim = int(rng.choice([16, 24, 64, 96]))
    dtype, scale_dtype = rng.choice(["bfloat16", "float16", "float32"], 2)
    model = ModelConfig(layers, heads, dim, str(dtype))
    context = int(rng.integers(1, 5 * page))
    pages = math.ceil(context / page)
    planned = plan(model, page_size=page, contexts=[context], scale_dtype=str(scale_dtype))
    assert len(planned.rows) == 5
    for row in planned.rows:
        spec = model.spec(page, row.format, str(scale_dtype))
        taken = sum(tensor.nbytes for tensor in spec.allocate(pages))
        assert row.request_bytes == {context: taken}
        assert row.bytes_per_token * pages * page == taken
        assert row.compression == layers * heads * dim * 4 * pages * page / taken


@pytest.mark.parametrize("quant", QUANT_SPECS)
def test_what_fits_fits_and_one_more_does_not(quant):
    rng = np.random.default_rng(7)
    model = ModelConfig(3, 2, 64)
    for _ in range(20):
        page, context = int(rng.integers(1, 33)), int(rng.integers(1, 200))
        gpu, weights = int(rng.integers(200_000, 10**7)), int(rng.integers(0, 50_000))
        row = rows(model, memory=Memory(gpu, weights, 0.75), page_size=page, contexts=[context])[
            quant
        ]
        spec = model.spec(page, quant)
        left = gpu * 3 // 4 - weights
        assert spec.total_bytes(row.pages) <= left < spec.total_bytes(row.pages + 1)
        assert row.tokens == row.pages * page
        assert row.requests == {context: row.pages // math.ceil(context / page)}
        assert row.requests[context] > 0


def test_a_request_takes_whole_pages():
    got = rows(LLAMA_8B, page_size=64, contexts=[1, 64, 65])["none"].request_bytes
    assert got == {1: 64 * 131072, 64: 64 * 131072, 65: 128 * 131072}


# Tensor parallelism


def test_ranks_share_the_heads_and_the_weights():
    memory = Memory(80 * GIB, 132 * GIB + 3, 1.0)
    planned = plan(LLAMA_70B, tp=4, memory=memory)
    assert planned.cache_bytes == 47 * GIB - 1  # 3 bytes on 4 ranks: one has a whole one
    row = planned.rows[0]
    assert row.bytes_per_token == 2 * 80 * 2 * 128 * 2
    assert row.requests[4096] == (47 * GIB - 1) // (4096 * row.bytes_per_token)
    assert planned.rows[3].static_bytes == 6 * 80 * 2 * 128 * 4
    assert planned.notes == ()


def test_more_ranks_than_heads_replicate():
    eight, sixteen = plan(LLAMA_70B, tp=8), plan(LLAMA_70B, tp=16)
    assert eight.rows == sixteen.rows
    assert eight.notes == ()
    assert sixteen.notes == ("Each KV head is on 2 of the 16 ranks.",)


@pytest.mark.parametrize("tp", [0, 3, 12])
def test_ranks_that_do_not_divide_the_heads_are_refused(tp):
    with pytest.raises(errors.SpecError) as caught:
        plan(LLAMA_8B, tp=tp)
    assert caught.value.argument == "tp_size"


# Formats


def test_the_configs_own_format_is_marked_with_its_granularity():
    own = ModelConfig(2, 4, 64, quant=QuantType.CACHE_INT8, granularity=Granularity.CHANNEL)
    got = rows(own)
    assert [name for name, row in got.items() if row.configured] == ["cache_int8"]
    assert got["cache_int8"].static_bytes == 4 * 2 * 4 * 64 * 4
    assert got["cache_fp8"].static_bytes == 4 * 2 * 4 * 4
    assert not any(row.configured for row in plan(LLAMA_8B).rows)


def test_formats_can_be_chosen_and_repeat_once():
    planned = plan(LLAMA_8B, formats=["cache_fp8", QuantType.NONE, "cache_fp8"])
    assert [row.format for row in planned.rows] == ["cache_fp8", "none"]


def test_a_format_that_the_head_dim_forbids_is_left_out_and_noted():
    planned = plan(ModelConfig(2, 1, 33))
    assert len(planned.rows) == 4
    assert planned.notes == ("cache_int4_zp is left out: head_dim: expected a multiple of 2.",)
    with pytest.raises(errors.SpecError, match="multiple of 2"):
        plan(ModelConfig(2, 1, 33), formats=["cache_int4_zp"])


# Windows

GEMMA = ModelConfig(6, 2, 64, windows=(100, 100, 100, 100, 100, None))
LAYER_PAGE = 2 * 2 * 16 * 64 * 2  # one page of 16 tokens in one layer, bf16


def test_a_layer_with_a_window_holds_every_token_unless_asked():
    planned = plan(GEMMA, page_size=16, contexts=[1600])
    assert planned.rows[0].request_bytes == {1600: 6 * 100 * LAYER_PAGE}
    assert planned.notes == ("5 of 6 layers see 100 tokens and are counted in full.",)


def test_windowed_layers_hold_the_pages_that_their_window_reaches():
    # 100 tokens that end anywhere reach 8 pages of 16: 7 x 16 = 112 may begin inside a page.
    memory = Memory(6 * 100 * LAYER_PAGE, 0, 1.0)
    contexts = [1, 64, 128, 129, 1600]
    planned = plan(GEMMA, page_size=16, contexts=contexts, windowed=True, memory=memory)
    row = planned.rows[0]
    held = {1: 6, 64: 24, 128: 48, 129: 9 + 40, 1600: 100 + 40}
    assert row.request_bytes == {n: pages * LAYER_PAGE for n, pages in held.items()}
    assert row.requests == {n: 600 // pages for n, pages in held.items()}
    assert (row.pages, row.tokens) == (560, 560 * 16)  # and 5 x 8 of the windows
    assert row.bytes_per_token == LAYER_PAGE // 16
    assert planned.notes == ("5 of 6 layers see 100 tokens and hold only its pages.",)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 18, 100])
@pytest.mark.parametrize("page", [1, 16])
def test_the_reach_of_a_window_is_the_most_pages_it_touches(window, page):
    touched = max(
        last // page - (last - window + 1) // page + 1 for last in range(window - 1, window + 64)
    )
    model = ModelConfig(1, 1, 8, windows=(window,))
    row = plan(model, page_size=page, contexts=[4096], windowed=True).rows[0]
    assert row.request_bytes == {4096: touched * page * 2 * 8 * 2}


def test_windows_of_two_sizes_and_no_layer_that_sees_all():
    model = ModelConfig(3, 1, 8, windows=(16, 16, 32))  # reach 2, 2 and 3 pages of 16
    page = 2 * 16 * 8 * 2
    options = {"page_size": 16, "contexts": [1600], "windowed": True, "formats": ["none"]}
    row = plan(model, memory=Memory(7 * page, 0, 1.0), **options).rows[0]
    assert row.request_bytes == {1600: 7 * page}
    assert (row.pages, row.tokens, row.requests) == (None, None, {1600: 1})
    assert row.bytes_per_token == 0
    assert row.compression == 1
    row = plan(model, memory=Memory(7 * page - 1, 0, 1.0), **options).rows[0]
    assert (row.pages, row.requests) == (2, {1600: 0})
    note = plan(model, **options).notes[0]
    assert note == "3 of 3 layers see 16 or 32 tokens and hold only its pages."


# Memory


@pytest.mark.parametrize("weights", [144, 145, 10_000])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(CapacityError) as caught:
        plan(LLAMA_8B, tp=2, memory=Memory(80 * GIB, weights * GIB, 0.9))
    assert str(caught.value) == (
        f"no memory for a cache: the weights take {weights / 2:.2f} GiB a rank, and "
        "80.00 GiB x 0.9 is 72.00 GiB"
    )


def test_less_than_one_page_of_any_format():
    page = 64 * 32768 + STATIC["cache_int4_zp"]  # the smallest: int4
    enough = rows(LLAMA_8B, memory=Memory(page, 0, 1.0))
    assert {name: row.pages for name, row in enough.items() if row.pages} == {"cache_int4_zp": 1}
    assert all(not any(row.requests.values()) for row in enough.values())
    with pytest.raises(CapacityError, match=f"{page - 1} bytes a rank are left"):
        plan(LLAMA_8B, memory=Memory(page - 1, 0, 1.0))


def test_scales_that_do_not_fit_leave_no_page():
    got = rows(LLAMA_8B, memory=Memory(700_000, 0, 1.0), page_size=1, contexts=[2])
    assert (got["none"].pages, got["none"].requests) == (5, {2: 2})
    assert (got["cache_int4_zp"].pages, got["cache_int4_zp"].requests) == (0, {2: 0})


def test_without_a_memory_nothing_is_said_of_capacity():
    planned = plan(LLAMA_8B)
    assert planned.cache_bytes is None
    assert {(row.pages, row.tokens, row.requests) for row in planned.rows} == {(None, None, None)}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, 0), "gpu"),
        ((1.5, 0), "gpu"),
        ((True, 0), "gpu"),
        ((2**61, 0), "gpu"),
        ((8, -1), "weights"),
        ((8, 0, 0.0), "utilization"),
        ((8, 0, 1.01), "utilization"),
        ((8, 0, math.nan), "utilization"),
    ],
)
def test_a_memory_that_no_gpu_has_is_refused(arguments, name):
    with pytest.raises(errors.SpecError) as caught:
        Memory(*arguments)
    assert (caught.value.op, caught.value.argument) == ("Memory", name)


def test_the_least_and_the_most_memory():
    assert Memory(2**60, 2**60, 1.0).gpu == 2**60
    assert Memory(1, 0, 1.0).for_cache(8) == 1
    with pytest.raises(errors.SpecError, match=f"0 to {2**60} bytes"):
        Memory(1, -1)


@pytest.mark.parametrize(
    ("options", "kind", "name"),
    [
        ({"contexts": [0]}, errors.SpecError, "contexts"),
        ({"contexts": [4096.0]}, errors.SpecError, "contexts"),
        ({"contexts": [True]}, errors.SpecError, "contexts"),
        ({"page_size": 0}, errors.SpecError, "page_size"),
        ({"scale_dtype": "int8"}, errors.SpecError, "scale_dtype"),
        ({"formats": ["int8"]}, errors.UnknownNameError, "formats"),
    ],
)
def test_bad_options_are_refused_by_name(options, kind, name):
    with pytest.raises(kind) as caught:
        plan(LLAMA_8B, **options)
    assert caught.value.argument == name
    assert caught.value.op == ("CacheSpec" if name in ("page_size", "scale_dtype") else "plan")
