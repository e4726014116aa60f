# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/backend_author.md that need PyTorch run after those before them."""

from helpers.pages import DOCS, blocks, own_prefill_error, run_story

PAGE = DOCS / "backend_author.md"


def test_the_page_runs_with_pytorch():
    assert [block.title for block in blocks(PAGE)].count("With PyTorch") == 1
    names = run_story(PAGE, (None, "With PyTorch"))
    assert names["torch_tensors"]["library"] == "torch"
    assert 0 < own_prefill_error(names) < 0.05
