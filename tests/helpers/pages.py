# SPDX-License-Identifier: Apache-2.0
"""The code blocks of a documentation page, run in order in one namespace."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: Pages whose blocks build on each other.
STORIES = ("backend_author.md",)

_PYTHON = re.compile(
    r'^```python(?: title="(?P<title>[^"]*)")?\n(?P<code>.*?)^```\n'
    r"(?:\n```text\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of Python, and the text block right behind it."""

    title: str | None
    code: str
    line: int
    printed: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of Python of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(
            found["title"], found["code"], text[: found.start()].count("\n") + 2, found["printed"]
        )
        for found in _PYTHON.finditer(text)
    ]


def run_story(page: Path, titles: tuple[str | None, ...] = (None,)) -> dict[str, Any]:
    """Run the blocks with these titles and compare what they print; returns their names."""
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks(page):
        if block.title in titles:
            printed = output(block, page, names)
            said = block.printed or ""
            assert printed.strip() == said.strip(), f"{page.name}:{block.line} prints\n{printed}"
    return names


def own_prefill_error(names: dict[str, Any]) -> float:
    """What backend_author.md's own prefill kernel leaves, among ops on PyTorch's tensors.

    The kernel computes on the host, the ops around it where the tensors are.
    """
    import torch

    def prefill(q, k, v, *, cu_seqlens_q, cu_seqlens_k, out=None, **options):
        out = torch.zeros_like(q) if out is None else out
        lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        host = {name: tensor.cpu().numpy() for name, tensor in lengths.items()}
        rows = [tensor.cpu().numpy() for tensor in (q, k, v)]
        attended = names["my_prefill"](*rows, **host, out=out.cpu().numpy().copy(), **options)
        return out.copy_(torch.from_numpy(attended))

    ops = SimpleNamespace(**{**vars(names["my_ops"]), "masked_attention": prefill})
    served = (names["FlashBackend"](ops), names["spec"], names["layer"])
    return float(names["serve"](*served, **names["torch_tensors"]))


def output(block: Block, page: Path, names: dict[str, Any]) -> str:
    """What a block prints; a traceback shows the page's own line."""
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
    return printed.getvalue()
