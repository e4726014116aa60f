# SPDX-License-Identifier: Apache-2.0
"""The picture of `fastkv eval`: KL against bytes per token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastkv.eval.measure import Row
from fastkv.optional import require

# Sums in another order give a KL of this size, which is none.
_ROUNDING = 1e-7


def require_matplotlib() -> Any:
    """matplotlib, or the error with the line that installs it."""
    return require("matplotlib", "fastkv eval --plot", "pip install 'fastkv[plot]'")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture; its format follows the file's suffix.

    Args:
        rows: the table; a row of KL 0, which has no place on a logarithmic axis, is a line. Rows
            with an exact prefill are hollow.
        title: of the picture.
        path: the file.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no global state
    axes = figure.add_subplot()
    formats = list(dict.fromkeys(row.format for row in rows))
    several = len(formats) < len(rows)
    for row in rows:
        i, held = formats.index(row.format), _held(row)
        label = f"{_label(row, several)}, {held:,.0f} B"
        if row.kl > _ROUNDING:
            # Hollow where the first tokens attended to each other exactly.
            face = "none" if row.exact_prefill else f"C{i}"
            axes.scatter(
                held,
                row.kl,
                s=60,
                label=label,
                marker="osD^vPX*h"[i % 9],
                facecolor=face,
                edgecolor=f"C{i}",
            )
        else:
            axes.axvline(held, color=f"C{i}", linestyle="--", label=f"{label}, KL 0")
    axes.set_axisbelow(True)
    axes.set_xscale("log", base=2)  # a format is a factor of another's size, not a distance from it
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if any(row.kl > _ROUNDING for row in rows):
        axes.set_yscale("log")
    axes.set_xlabel("bytes per token, all layers, scales and window included")
    axes.set_ylabel("KL divergence from the float32 cache, nats a token")
    axes.set_title(title)
    axes.grid(which="both", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def _held(row: Row) -> float:
    return row.bytes_per_token if row.held_per_token is None else row.held_per_token


def _label(row: Row, several: bool) -> str:
    parts = [f"{row.format} ({row.dtype})"]
    if several and row.granularity is not None:
        parts.append(f"{row.granularity}, {row.calibration}")
    if row.exact_prefill:
        parts.append("exact prefill")
    if row.window:
        parts.append(f"window {row.window}")
    return ", ".join(parts)
