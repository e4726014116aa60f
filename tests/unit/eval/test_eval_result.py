# SPDX-License-Identifier: Apache-2.0
"""The committed result of `fastkv eval` is within the bounds, and the documentation shows it."""

import json
from pathlib import Path

import pytest

from fastkv.eval.bounds import BOUNDS, missed
from fastkv.eval.measure import Row, Table
from fastkv.eval.text import Span

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def document():
    return json.loads((ROOT / "benchmarks/results/eval_smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture
def table(document):
    rows = tuple(Row(**row) for row in document["rows"])
    return Table(document["float32_perplexity"], rows)


def markdown(row, bound):
    name = f"`{row.format}`" + (f", {row.dtype}" if row.format == "none" else "")
    name += f", per {row.granularity}" if row.granularity else ""
    numbers = f"{row.bytes_per_token:,} | {row.kl:.5f} | {bound:g} | {row.perplexity:.3f}"
    return f"| {name} | {numbers} | {100 * row.top1:.1f} | {row.tokens_per_s:.0f} |"


def test_the_committed_result_is_within_its_bounds(document, table):
    assert document["score"] == "0:3072"
    assert document["calibrate"] == "20000:22048"
    bounds = BOUNDS[Span(0, 3072)]
    assert {row.format for row in table.rows} == set(bounds.max_kl)
    assert missed(table, bounds) == document["missed"] == []


def test_the_documentation_shows_the_committed_result(table):
    page = (ROOT / "docs/eval.md").read_text(encoding="utf-8")
    bounds = BOUNDS[Span(0, 3072)].max_kl
    for row in table.rows:
        assert markdown(row, bounds[row.format]) in page
