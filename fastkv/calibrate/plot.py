# SPDX-License-Identifier: Apache-2.0
"""The picture of `fastkv calibrate`: the ranges per layer, outlier heads named."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.calibrate.errors import OP
from fastkv.calibrate.report import Outlier, Ranges
from fastkv.errors import ContractError
from fastkv.optional import require
from fastkv.scales.storage import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of one side: more labels would hide each other.
_LABELS = 12


def require_plot(path: Path) -> None:
    """Raise where matplotlib is missing, or knows no such kind of picture."""
    require("matplotlib", f"{OP} --plot", "pip install 'fastkv[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if _kind(path) not in kinds:
        raise ContractError(
            OP,
            "--plot",
            expected=f"a name that ends in .{', .'.join(sorted(kinds))}",
            got=str(path),
        )


def figure(ranges: Mapping[str, Ranges], outliers: Sequence[Outlier], title: str) -> "Figure":
    """Two panels, K and V: each head's largest magnitude over the layers, and what is covered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(made)  # no display, no global state
    for axes, (side, of) in zip(made.subplots(2, 1, sharex=True), ranges.items(), strict=True):
        named = [each for each in outliers if each.side == side]
        _panel(axes, side.upper(), of, named)
    made.suptitle(title)
    return made


def save(made: "Figure", path: Path) -> None:
    """Write the picture whole or not at all; its format follows the file's suffix."""
    content = BytesIO()
    made.savefig(content, dpi=150, format=_kind(path))
    write(path, content.getvalue())


def _kind(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def _panel(axes: Any, name: str, of: Ranges, outliers: Sequence[Outlier]) -> None:
    layers, heads = of.amax.shape
    for head in range(heads):
        x = np.arange(layers) + (head - (heads - 1) / 2) * 0.6 / heads
        axes.vlines(x, 0, of.covered[:, head], color=f"C{head % 10}", alpha=0.35, linewidth=2)
        label = f"head {head}" if heads <= 10 else None
        axes.scatter(x, of.amax[:, head], s=14, color=f"C{head % 10}", label=label)
    for each in outliers[:_LABELS]:
        x = each.layer + (each.head - (heads - 1) / 2) * 0.6 / heads
        left = each.layer < layers / 2  # the label points to the middle, where there is room
        axes.annotate(
            f"layer {each.layer} head {each.head}: {each.ratio:.1f}×",
            (x, each.amax),
            xytext=(4 if left else -4, 4),
            textcoords="offset points",
            ha="left" if left else "right",
            fontsize=7,
        )
    axes.set_ylabel(f"|{name}|: dots observed, bars covered")
    axes.set_xlabel("layer")
    axes.set_ylim(0, 1.15 * max(of.amax.max(), of.covered.max()))
    axes.grid(alpha=0.3)
    if heads <= 10:
        axes.legend(loc="upper left", fontsize=8)
