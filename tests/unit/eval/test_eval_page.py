# SPDX-License-Identifier: Apache-2.0
"""docs/eval.md stands for the committed comparison with QuantizedCache, in tables and in words."""

import copy
from pathlib import Path

import pytest

import eval_page
from fastkv.eval.subject import PEERS
from fastkv.quant import QUANT_SPECS

ROOT = Path(__file__).resolve().parents[3]


PAGE = eval_page.PAGE.read_text("utf-8")
RESULT = eval_page.json.loads(eval_page.RESULT.read_text("utf-8"))
ROWS = RESULT["rows"]


def kl(name, **wanted):
    """The lowest KL of a cache's rows."""
    rows = [row for row in ROWS if row["format"] == name]
    return min(row["kl"] for row in rows if all(row[key] == wanted[key] for key in wanted))


def test_page_and_picture_show_the_result():
    assert eval_page.problems(PAGE, RESULT) == []
    assert f"]({eval_page.PICTURE.name})" in PAGE
    picture = eval_page.PICTURE.read_text("utf-8")
    for name in {row["format"] for row in ROWS} - {"none"}:
        assert name in picture


@pytest.mark.parametrize("field", ["kl", "perplexity", "held_per_token", "calibration"])
def test_another_result_is_noticed(field):
    other = copy.deepcopy(RESULT)
    row = next(row for row in other["rows"] if row["format"] == "cache_int8")
    row[field] = "another" if field == "calibration" else 2 * row[field]
    assert any("block peers is not" in text for text in eval_page.problems(PAGE, other))


def test_every_peer_and_every_format_it_had_is_there():
    assert {row["format"] for row in ROWS} & set(PEERS) == set(PEERS)
    assert {row["format"] for row in ROWS} - set(PEERS) <= set(QUANT_SPECS)


def test_what_the_page_says_in_words():
    best = min(row["kl"] for row in ROWS if row["format"] != "none")
    everything_quantized = {"exact_prefill": 0}
    assert best == kl("cache_int8", granularity="channel")
    assert kl("block_wise_fp8", **everything_quantized) < min(map(kl, PEERS))
    assert kl("cache_fp8", **everything_quantized) == pytest.approx(kl("fp8"), rel=0.05)
    four_bits = [name for name in PEERS if PEERS[name].window]
    assert kl("cache_int4_zp") > 3 * max(map(kl, four_bits))
    held = {row["format"]: row["held_per_token"] for row in ROWS}
    assert held["cache_int4_zp"] < min(held[name] for name in four_bits)
