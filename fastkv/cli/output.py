# SPDX-License-Identifier: Apache-2.0
"""What the commands share: where tables, progress and JSON go."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

_PIPED_WIDTH = 110

#: The option of every command that a program may read.
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write as JSON; - is standard output."),
]


def console() -> Console:
    """Standard output. Piped output gets the width it needs unless COLUMNS says one."""
    asked = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if asked else _PIPED_WIDTH, highlight=False)


def progress_console() -> Console:
    """Standard error, so that progress never mixes with a table or JSON on standard output."""
    return Console(stderr=True)


def table(title: str, *columns: str, numeric: tuple[str, ...] = ()) -> Table:
    """A table; the numeric columns are aligned right."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        made.add_column(column, justify="right" if column in numeric else "left")
    return made


def require_folder(path: Path | None) -> None:
    """Raise `FileNotFoundError` before a long job, not after it, if its result has no place."""
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"no folder {str(path.absolute().parent)!r} to write {path.name} to"
        )


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON to a file, or to standard output where the path is `-`."""
    text = json.dumps(value, indent=2) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text, encoding="utf-8")
