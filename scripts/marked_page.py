# SPDX-License-Identifier: Apache-2.0
"""Pages whose figures a script writes: each block stands between `<!-- name -->` and
`<!-- /name -->`; the rest is written by hand. performance.py, formats.py and others use it.
"""

from collections.abc import Iterable, Mapping, Sequence


def shown(page: str, names: Iterable[str]) -> dict[str, str]:
    """The blocks as the page has them."""
    found = {}
    for name in names:
        begin, end = markers(name)
        assert page.count(begin) == page.count(end) == 1, f"the page has one block {name}"
        found[name] = page.partition(begin)[2].partition(end)[0].strip()
    return found


def markers(name: str) -> tuple[str, str]:
    """The comments around a block."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def rewrite(page: str, texts: Mapping[str, str]) -> str:
    """The page with these blocks replaced."""
    shown(page, texts)  # every block is there once
    for name, text in texts.items():
        begin, end = markers(name)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


def number(us: float) -> str:
    """Three digits."""
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells."""
    return "\n".join([line(head), rule(len(head)), *map(line, rows)])


def rule(columns: int) -> str:
    """The line under a table's head."""
    return "|" + "---|" * columns
