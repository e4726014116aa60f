# SPDX-License-Identifier: Apache-2.0
"""Every Python example of the README and the documentation runs."""

import re
from pathlib import Path

import pytest

from helpers.pages import STORIES, blocks, run_story

ROOT = Path(__file__).resolve().parents[2]
# What needs transformers, ranks or an engine: tests/integration/transformers, …/torch and
# tests/transfer run it. The blocks of a story run in order.
ELSEWHERE = {"transformers.md", "distributed.md", "transfer.md", "store.md", *STORIES}
# Titles of the blocks that other suites run, with the library or device that they need.
TITLES = {"With Paddle", "With PyTorch", "On a GPU"}
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


@pytest.mark.parametrize("name", STORIES)
def test_a_story_runs_and_prints_what_it_says(name):
    names = run_story(ROOT / "docs" / name)
    assert "MyBackend" in names


@pytest.mark.parametrize("name", STORIES)
def test_every_output_in_a_story_stands_behind_a_block_that_runs_here(name):
    page = ROOT / "docs" / name
    printed = [block for block in blocks(page) if block.printed is not None]
    assert len(printed) == page.read_text("utf-8").count("```text\n")
    assert all(block.title is None for block in printed)


def test_a_story_with_another_output_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:6 prints\n1"):
        run_story(page)


def test_no_example_has_a_title_that_no_suite_runs():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text("utf-8")
        assert {block.title for block in blocks(page)} <= {None, *TITLES}
        assert len(blocks(page)) == len(re.findall(r"^```python", text, re.MULTILINE)), page.name
        for block in blocks(page):
            compile(block.code, str(page), "exec")


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
