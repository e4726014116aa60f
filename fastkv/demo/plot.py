# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: error against bytes per token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkv.demo.measure import Row
from fastkv.optional import require


def require_matplotlib() -> Any:
    """matplotlib, or the error with the line that installs it."""
    return require("matplotlib", "fastkv demo --plot", "pip install 'fastkv[plot]'")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the picture; its format follows the file's suffix."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global state
    axes = figure.add_subplot()
    formats = list(dict.fromkeys(row.format for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    for i, backend in enumerate(backends):
        own = [row for row in rows if row.backend == backend]
        shift = 0.2 * (i - (len(backends) - 1) / 2)  # backends of one format side by side
        x = [formats.index(row.format) + shift for row in own]
        axes.scatter(x, [r.error for r in own], color=f"C{i}", marker="osD^v"[i % 5], label=backend)
        axes.scatter(x, [r.bound for r in own], color=f"C{i}", marker="_", s=200)
    axes.scatter([], [], color="grey", marker="_", s=200, label="bound from the format's step")
    sizes = {row.format: row.bytes_per_token for row in rows}
    axes.set_xticks(range(len(formats)), [f"{name}\n{sizes[name]} B/token" for name in formats])
    axes.set_yscale("log")
    axes.set_ylabel("relative error of the attention output")
    axes.set_title("Real attention through a quantized KV cache, against float64")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
