# SPDX-License-Identifier: Apache-2.0
"""docs/scale.md and the speeds of docs/transfer.md stand for the committed result."""

import copy
import re
from pathlib import Path

import pytest

import scale_page
from fastkv import CacheSpec

ROOT = Path(__file__).resolve().parents[2]


PAGES, RESULT = scale_page.load()
SCALE = PAGES[ROOT / "docs" / "scale.md"]


def test_the_pages_show_the_result():
    assert scale_page.problems(PAGES, RESULT) == []


@pytest.mark.parametrize("field", ["push_GBps", "raw_GBps", "push_ratio", "part_bytes"])
def test_another_result_is_noticed(field):
    other = copy.deepcopy(RESULT)
    other["rows"][0][field] *= 3
    assert any("block parts is not" in text for text in scale_page.problems(PAGES, other))


def test_the_assumptions_are_those_of_the_tables():
    said = (
        f"{scale_page.LAYERS} layers, {scale_page.HEADS} KV heads, D {scale_page.DIM}; pages of "
        f"{scale_page.PAGE} tokens"
    )
    assert said in SCALE
    assert f"A prompt has {scale_page.PROMPT:,} tokens" in SCALE
    assert f"computes {scale_page.RATE:,} prompt tokens a second" in SCALE
    assert scale_page.SHARED == 0.5
    assert f"a link of {scale_page.LINK} GB/s, {8 * scale_page.LINK} Gbit/s" in SCALE


def test_the_fleet_by_hand():
    """One prefill GPU, bf16: 20,000 tokens a second of 131,072 bytes, half of them hits."""
    assert CacheSpec(32, 8, 128, 16).bytes_per_token() == 131_072
    row = re.search(r"^\| 1 \| `none` \| (.*) \|$", SCALE, re.M)
    out, link, hits, hour = row[1].split(" | ")
    assert float(out) == pytest.approx(20_000 * 131_072 / 1e9, rel=0.02)
    assert link == f"{100 * (20_000 + 10_000) * 131_072 / 50e9:.1f} %"  # and into the store
    assert float(hits) == pytest.approx(10_000 * 131_072 / 1e9, rel=0.03)
    assert float(hour) == pytest.approx(10_000 * 131_072 * 3600 / 1e12, rel=0.02)
    pages = 10_000 * 10_000 * 3600 / 16
    assert f"{pages / 1e9:.1f} billion" in SCALE
    assert f"{32 * pages / 1e12:.1f} TB of names" in SCALE


def test_what_the_page_says_of_links():
    shares = re.findall(r"^\| 10,000 \| `(\w+)` .* \| ([\d.]+) % \|", SCALE, re.M)
    found = {name: float(share) for name, share in shares}
    assert found["none"] == pytest.approx(60, rel=0.06)
    assert found["cache_int4_zp"] == pytest.approx(100 / 6, rel=0.06)
