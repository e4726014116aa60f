# SPDX-License-Identifier: Apache-2.0
"""Every Python example of the README and the documentation runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What needs transformers, or ranks: tests/integration/transformers and …/torch run it.
ELSEWHERE = {"transformers.md", "distributed.md"}
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name not in ELSEWHERE)
PAGES = [ROOT / "README.md", *DOCS]


def examples():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 2
            yield pytest.param(match[1], page, line, id=f"{page.name}:{line}")


@pytest.mark.parametrize(("code", "page", "line"), list(examples()))
def test_example_runs(code, page, line):
    blank_lines = "\n" * (line - 1)  # a traceback shows the page's own line
    exec(compile(blank_lines + code, str(page), "exec"), {"__name__": "example"})


def test_the_pages_with_examples_are_found():
    pages = {parameter.values[1].name for parameter in examples()}
    assert {"README.md", "formats.md", "ops.md", "policies.md"} <= pages


def test_the_error_that_the_readme_quotes_is_real():
    from types import SimpleNamespace

    from fastkv import CacheSpec
    from fastkv.backends import resolve
    from fastkv.errors import MissingTensorError

    spec = CacheSpec(2, 2, 64, 16, "block_wise_fp8")
    caches = [object() for _ in range(8)]
    caches[6] = None
    layer = SimpleNamespace(layer_id=1, cache_quant_type_str="block_wise_fp8")
    with pytest.raises(MissingTensorError) as error:
        resolve(caches, layer, spec)
    assert str(error.value) in (ROOT / "README.md").read_text(encoding="utf-8")
