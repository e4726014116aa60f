# SPDX-License-Identifier: Apache-2.0
"""Tables in the documentation are the ones that the code prints."""

from pathlib import Path

import pytest

from fastkv.backends import BACKEND_NAMES, FEATURES, kernels
from fastkv.backends.features import BACKENDS, markdown_table

POLICIES = Path(__file__).resolve().parents[2] / "docs" / "policies.md"


@pytest.mark.parametrize(
    ("name", "printed"), [("feature", markdown_table), ("kernels", kernels.markdown_table)]
)
def test_a_table_is_the_one_of_the_code(name, printed):
    text = POLICIES.read_text("utf-8")
    begin, end = f"<!-- {name} table -->", f"<!-- /{name} table -->"
    assert text.count(begin) == text.count(end) == 1
    shown = text.partition(begin)[2].partition(end)[0]
    assert shown.strip() == printed()


def test_feature_table_has_a_cell_for_everything():
    head, rule, *rows = [line.strip("|").split("|") for line in markdown_table().splitlines()]
    assert [cell.strip() for cell in head[3:]] == [name.replace("_", " ") for name in FEATURES]
    assert len(rule) == len(head) == 3 + len(FEATURES)
    assert [row[0].strip() for row in rows] == [f"`{name}`" for name in BACKEND_NAMES]
    for row, backend in zip(rows, BACKENDS.values(), strict=True):
        for op in (*backend.prefill, *backend.decode):
            assert f"`{op}`" in row[1] + row[2]
        for cell, feature in zip(row[3:], FEATURES, strict=True):
            assert cell.strip() == ("refused" if feature in backend.refuses else "yes")
