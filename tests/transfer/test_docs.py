# SPDX-License-Identifier: Apache-2.0
"""The example of docs/transfer.md, as it stands there."""

from helpers.pages import DOCS, blocks


def test_the_example_runs_and_prints_its_counters(capsys):
    (example,) = blocks(DOCS / "transfer.md")
    exec(compile(example.code, "transfer.md", "exec"), {"__name__": "example"})
    lines = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["blocks sent"], lines["done"], lines["quarantined"]) == ("8", "1", "0")
