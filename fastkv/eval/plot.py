# SPDX-License-Identifier: Apache-2.0
"""The picture of `fastkv eval`: KL against bytes per token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkv.eval.measure import Row
from fastkv.optional import require


def require_matplotlib() -> Any:
    """matplotlib, or the error with the line that installs it."""
    return require("matplotlib", "fastkv eval --plot", "pip install 'fastkv[plot]'")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture; its format follows the file's suffix.

    Args:
        rows: the table; a row of KL 0, which has no place on a logarithmic axis, is a line.
        title: of the picture.
        path: the file.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global state
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        label = f"{row.format} ({row.dtype}), {row.bytes_per_token:,} B"
        if row.kl > 0:
            marker = "osD^v"[i % 5]
            axes.scatter(
                row.bytes_per_token, row.kl, s=60, color=f"C{i}", marker=marker, label=label
            )
        else:
            axes.axvline(row.bytes_per_token, color=f"C{i}", linestyle="--", label=f"{label}, KL 0")
    axes.set_axisbelow(True)
    axes.set_xlim(left=0)
    if any(row.kl > 0 for row in rows):
        axes.set_yscale("log")
    axes.set_xlabel("bytes per token, all layers")
    axes.set_ylabel("KL divergence from the float32 cache, nats a token")
    axes.set_title(title)
    axes.grid(which="both", alpha=0.3)
    axes.legend(loc="upper center")
    figure.savefig(path, dpi=150)
