# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/transformers.md run, one after the other, and print what the page says."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "transformers.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n\n^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page_prints_what_it_says():
    text = PAGE.read_text("utf-8")
    examples = list(EXAMPLE.finditer(text))
    assert len(examples) == text.count("```python") == text.count("```text") == 5
    torch._dynamo.reset()
    namespace = {"__name__": "example"}
    for example in examples:
        line = text[: example.start()].count("\n") + 1
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * line + example[1], str(PAGE), "exec"), namespace)
        assert printed.getvalue() == example[2]
