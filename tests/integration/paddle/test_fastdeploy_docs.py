# SPDX-License-Identifier: Apache-2.0
"""Every example of the documentation that needs Paddle runs; the others run in the unit tests."""

import re
from pathlib import Path

import numpy as np
import pytest

from fastkv import arrays

ROOT = Path(__file__).resolve().parents[3]
FENCE = re.compile(r'^```python title="With Paddle"\n(.*?)^```', re.MULTILINE | re.DOTALL)


def examples():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 2
            yield pytest.param(match[1], page, line, id=f"{page.name}:{line}")


def run(code, page, line):
    names = {"__name__": "example"}
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
    return names


@pytest.mark.parametrize(("code", "page", "line"), list(examples()))
def test_example_runs(code, page, line):
    run(code, page, line)


def test_the_step_of_the_example_attends():
    names = run(*next(iter(examples())).values)
    out = arrays.to_host(names["out"]).astype(np.float32)
    assert np.isfinite(out).all()
    assert (np.abs(out).max(axis=1) > 0).all()
    # The first row sees its own V alone, exact, in every group of query heads.
    own = arrays.to_host(names["qkv"]).astype(np.float32)[0, -2 * 128 :].reshape(2, 1, 128)
    assert (out[0].reshape(2, 4, 128) == own).all()


def test_every_example_with_paddle_is_found():
    pages = [page.read_text("utf-8") for page in (ROOT / "docs").rglob("*.md")]
    assert len(list(examples())) == sum(text.count('title="With Paddle"') for text in pages) == 2
