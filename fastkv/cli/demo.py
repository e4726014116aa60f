# SPDX-License-Identifier: Apache-2.0
"""`fastkv demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkv import __version__
from fastkv.cli.output import JsonFile, console, progress_console, require_folder, table, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from fastkv.demo.measure import Demo, Row


def demo(
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw error against bytes per token (PNG)."),
    ] = None,
) -> None:
    """Serve real Q, K and V through every backend and format, and compare with float64.

    A sample of SmolLM2-135M (three layers, before RoPE) is served as a mixed batch, step by step as
    an engine would: prefill, chunks over a cached prefix, decode, draft tokens. The error is that
    of the attention output against float64 attention over the unquantized K and V. Exits with 1
    when a format misses the bound that its step allows.

    **Examples**

    * `fastkv demo`
    * `fastkv demo --json rows.json --plot demo.png`
    * `fastkv demo --json - | jq '.rows[] | {backend, format, error}'`
    """
    from fastkv.demo.measure import Demo

    require_folder(json_file)
    require_folder(plot)
    if plot is not None:
        from fastkv.demo.plot import require_matplotlib

        require_matplotlib()
    with _progress() as progress:
        task = progress.add_task("exact attention", total=None)
        measured = Demo()
        cells = measured.cells()
        progress.update(task, description="backend x format", total=len(cells))
        rows = measured.rows(cells, done=lambda: progress.advance(task))
    if json_file is None or str(json_file) != "-":
        _show(measured, rows)
    if json_file is not None:
        write_json(json_file, _document(measured, rows))
    if plot is not None:
        from fastkv.demo.plot import draw

        draw(rows, plot)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=progress_console(), transient=True)


def _show(measured: "Demo", rows: "list[Row]") -> None:
    out = console()
    out.print(_table(measured, rows))
    fixed = {row.format: row.fixed_bytes for row in rows if row.fixed_bytes}
    sizes = ", ".join(f"{name} {size} B" for name, size in fixed.items())
    out.print(f"Static scales and zero points come on top, once for all tokens: {sizes}.")
    missed = [row for row in rows if not row.ok]
    for row in missed:
        out.print(f"MISSED: {row.backend} {row.format}: {row.error:.4f} > {row.bound:.4f}")
    if not missed:
        out.print(f"All {len(rows)} within the bound that their format's step allows.")


def _table(measured: "Demo", rows: "list[Row]") -> "Table":
    sample = measured.sample
    layers = ", ".join(map(str, sample.layer_ids))
    title = (
        f"{sample.model}, layers {layers}: {len(measured.requests)} requests, "
        f"{sum(len(request.tokens) for request in measured.requests)} tokens"
    )
    numeric = ("B/token", "x", "error", "bound", "worst row", "s")
    made = table(title, "backend", "format", *numeric, numeric=numeric)
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1].backend != row.backend
        made.add_row(
            row.backend,
            row.format,
            f"{row.bytes_per_token}",
            f"{row.compression:.2f}",
            f"{row.error:.4f}",
            f"{row.bound:.4f}",
            f"{row.worst_row:.4f}",
            f"{row.seconds:.2f}",
            end_section=last,
            style=None if row.ok else "red",
        )
    return made


def _document(measured: "Demo", rows: "list[Row]") -> dict[str, object]:
    return {
        "fastkv": __version__,
        "model": measured.sample.model,
        "layer_ids": list(measured.sample.layer_ids),
        "rows": [row.as_dict() for row in rows],
    }
