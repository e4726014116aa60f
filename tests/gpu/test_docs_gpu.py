# SPDX-License-Identifier: Apache-2.0
"""Every block of docs/backend_author.md runs, in order, on a GPU."""

from helpers.pages import DOCS, blocks, own_prefill_error, run_story

PAGE = DOCS / "backend_author.md"


def test_the_page_runs_on_a_gpu():
    titles = {block.title for block in blocks(PAGE)}
    names = run_story(PAGE, tuple(titles))
    assert names["device"] == "cuda:0"
    assert 0 < own_prefill_error(names) < 0.05
    assert names["attended"].shape == (1, names["HQ"], names["D"])
