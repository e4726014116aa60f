# SPDX-License-Identifier: Apache-2.0
"""From the results of the GPU benchmarks to the tables and the picture of docs/performance.md.

    python scripts/performance.py            # rewrite the page's tables and docs/performance.svg
    python scripts/performance.py --check    # say what differs, and exit with 1

The page holds each table between two comments, `<!-- decode -->` and `<!-- /decode -->`; the rest
of it is written by hand. tests/unit/test_performance_docs.py runs the check.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kernel_sources
import marked_page
from fastkv.ops.cuda.jit import source_digests
from marked_page import number, rewrite, rule, shown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance.svg"
BENCHMARKS = ("decode", "prefill", "prefix", "write", "gather", "host", "startup")
BLOCKS = ("runs", "picture", *BENCHMARKS)
NOTHING = "No run is recorded yet."
NO_PAGE = "–"
PAGELESS = "masked_attention"  # K and V are contiguous
# Stands beside every ratio to XQA over an fp8 cache; the page's text says what it means.
MARK = "†"

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def load(folder: Path = RESULTS) -> dict[str, Document]:
    """The results that there are, by the benchmark's short name."""
    paths = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {
        name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()
    }


def stale(documents: Mapping[str, Document], digests: Mapping[str, str]) -> list[str]:
    """Results of other kernels than those with `digests`."""
    return [
        text
        for name, document in documents.items()
        for text in kernel_sources.stale(f"benchmarks/results/{name}.json", document, digests)
    ]


def blocks(documents: Mapping[str, Document]) -> dict[str, str]:
    """The text of every block of the page."""
    tables = dict.fromkeys(BENCHMARKS, NOTHING)
    for name, document in documents.items():
        tables[name] = startup(document) if name == "startup" else table(document)
    picture = "![Ratio to the best peer, and bandwidth](performance.svg)"
    drawn = any(row["bytes"] for document in documents.values() for row in document["rows"])
    return {"runs": runs(documents), "picture": picture if drawn else NOTHING, **tables}


def runs(documents: Mapping[str, Document]) -> str:
    """Device, kernels, ceilings, versions and command of every run; the kernels' sources."""
    if not documents:
        return NOTHING
    head = "| Benchmark | Device | Kernels | Commit | Read, copy TB/s | Versions |"
    lines = [head, rule(6)]
    for name, document in documents.items():
        ceilings = document["ceilings"]
        rates = [ceilings.get(f"{what}_TBps") for what in ("read", "copy")]
        versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items() if k != "fastkv")
        cells = (
            name,
            document["device"],
            ", ".join(f"`{kernel}`" for kernel in sorted(kernel_sources.digests_of(document))),
            f"`{document['commit']}`",
            ", ".join("–" if rate is None else f"{rate:.2f}" for rate in rates),
            versions,
        )
        lines.append(f"| {' | '.join(cells)} |")
    commands = "\n".join(f"{document['command']}" for document in documents.values())
    sources = f"Kernel sources: {kernel_sources.listed(documents.values())}."
    return "\n".join(lines) + f"\n\n{sources}\n\n```console\n{commands}\n```"


def table(document: Document) -> str:
    """One line a shape and page size, one column a format; errors of the run below."""
    rows = document["rows"]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault(place(row), {})[row["format"]] = cell(row)
    # The pages of one shape stand together, shapes in the order of the run.
    shapes = list(dict.fromkeys(shape for shape, _ in cells))
    paged = any(page != NO_PAGE for _, page in cells)
    head = ["Shape", *(["Page"] if paged else []), *(f"`{name}`" for name in formats)]
    lines = [
        [shape, *([page] if paged else []), *(found.get(name, "–") for name in formats)]
        for shape in shapes
        for (of, page), found in cells.items()
        if of == shape
    ]
    return marked_page.table(head, lines) + failures(document)


def failures(document: Document) -> str:
    """Errors of the run, below its table."""
    if not document["errors"]:
        return ""
    alike: dict[str, list[str]] = {}
    for error in document["errors"]:
        where, _, why = error.replace("`", "").partition(": ")
        alike.setdefault(why, []).append(where)
    lines = [_failure(why, where) for why, where in alike.items()]
    return "\n\nNot measured, or not as expected:\n\n" + "\n".join(lines)


def _failure(why: str, where: list[str]) -> str:
    """One line for one reason, with the first place that has it."""
    more = f" and {len(where) - 1} more" if len(where) > 1 else ""
    return f"- `{where[0]}`{more}: `{why}`"


def startup(document: Document) -> str:
    """One line an op, one column a format: seconds cold and from the disk; errors below."""
    rows = document["rows"]
    formats = list(dict.fromkeys(row["format"] for row in rows))
    times = {(row["op"], row["format"], row["shape"]): row["us"] / 1e6 for row in rows}
    lines = [f"| Op: cold, disk in s | {' | '.join(f'`{name}`' for name in formats)} |"]
    lines.append(rule(1 + len(formats)))
    for op in dict.fromkeys(row["op"] for row in rows):
        pairs = [[times.get((op, fmt, shape)) for shape in ("cold", "disk")] for fmt in formats]
        cells = (", ".join("–" if s is None else f"{s:.2f}" for s in pair) for pair in pairs)
        lines.append(f"| `{op}` | {' | '.join(cells)} |")
    imports = next((row["import_us"] for row in rows if row["import_us"] is not None), None)
    if imports is not None:
        lines += ["", f"Of every first call, `import cupy` takes {imports / 1e6:.2f} s."]
    return "\n".join(lines) + failures(document)


def place(row: Row) -> tuple[str, str]:
    """A row's shape without its page size, with the op where one table holds several; the page."""
    match = re.fullmatch(r"(.*) P(\d+)(.*)", row["shape"])
    if match is None:
        assert row["op"] == PAGELESS, f"a row's shape holds its page size: {row['shape']}"
        return row["shape"], NO_PAGE
    shape = f"{match[1]}{match[3]}".replace("x", " × ", 1)
    if not row["bytes"]:  # the host's cost: the shape is the same for all ops
        shape = f"`{row['op']}`"
    return shape, match[2]


def cell(row: Row) -> str:
    """Time; rate; ratio to the peer, above 1 where fastkv is faster."""
    parts = [f"{number(row['us'])} µs"]
    if row.get("TFLOPs"):
        parts.append(f"{row['TFLOPs']:.0f} TFLOP/s")
    if row["bytes"]:
        parts.append(f"{row['TBps']:.2f} TB/s")
    if row["peer"]:
        peer = row["peer"] + (f" {MARK}" if compares_with_low_precision(row) else "")
        parts.append(f"**{row['ratio']:.2f} ×** {peer}, {number(row['peer_us'])} µs")
    return "<br>".join(parts)


def compares_with_low_precision(row: Row) -> bool:
    """Whether the peer computes with e4m3 q and P: XQA, over anything but a 16-bit cache."""
    return str(row["peer"]).startswith("XQA") and row["format"] != "none"


def problems(page: str, documents: Mapping[str, Document], digests: Mapping[str, str]) -> list[str]:
    """Why the page and the results do not stand for these kernels' sources; none if they do."""
    found = stale(documents, digests)
    there, wanted = shown(page, BLOCKS), blocks(documents)
    for name in BLOCKS:
        if there[name] != wanted[name]:
            found.append(f"docs/performance.md: block {name} is not what the results say")
    quoted = set(re.findall(r"`([0-9a-f]{16})`", page))
    found += [
        f"docs/performance.md quotes sources {other}, which are no kernel's"
        for other in sorted(quoted - set(digests.values()))
    ]
    return found


# --- the picture ---------------------------------------------------------------------------------

OPS = {"decode": "attention", "prefill": "prefill", "write": "write", "gather": "gather"}
CEILING = {"decode": "read_TBps", "write": "copy_TBps", "gather": "copy_TBps"}


def draw(documents: Mapping[str, Document], path: Path = PICTURE) -> None:
    """Ratio to the best peer, and the rate against the ceiling of the same run; page 16."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    points = [point for name in OPS if name in documents for point in of(name, documents[name])]
    labels = list(dict.fromkeys(label for label, *_ in points))
    formats = list(dict.fromkeys(fmt for _, fmt, *_ in points))
    with rc_context({"svg.hashsalt": "fastkv", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 1.5 + 0.28 * len(labels)), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for i, fmt in enumerate(formats):
            own = [(labels.index(p[0]), *p[2:]) for p in points if p[1] == fmt]
            style = {"color": f"C{i}", "marker": "osD^vP"[i % 6], "s": 26, "label": fmt}
            rated = [(y, ratio) for y, ratio, _ in own if ratio is not None]
            left.scatter([ratio for _, ratio in rated], [y for y, _ in rated], **style)
            placed = [(y, share) for y, _, share in own if share is not None]
            right.scatter([share for _, share in placed], [y for y, _ in placed], **style)
        axis(left, "time of the best peer / time of fastkv", 1.0)
        axis(right, "share of the device's bandwidth", 1.0)
        left.set_yticks(range(len(labels)), labels)
        left.invert_yaxis()
        right.set_xlim(left=0)
        right.legend(loc="lower left", fontsize="small")
        figure.savefig(path, metadata={"Date": None})


def axis(axes: Any, title: str, line: float) -> None:
    axes.set_xlabel(title)
    axes.axvline(line, color="grey", linewidth=1)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def of(name: str, document: Document) -> Iterable[tuple[str, str, float | None, float | None]]:
    """(label, format, ratio, share of the ceiling) of a result's rows at page 16, or its only one.

    The share of rows that compute more than they read would say nothing: they have none.
    """
    ceiling = document["ceilings"].get(CEILING.get(name, ""))
    for row in only_small_pages(document["rows"]):
        shape, _ = place(row)
        share = None if ceiling is None or row.get("TFLOPs", 0) > 200 else row["TBps"] / ceiling
        yield f"{OPS[name]} {shape}", row["format"], row["ratio"], share


def only_small_pages(rows: Sequence[Row]) -> list[Row]:
    """Of each shape and format the row with the smallest page."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (place(row)[0], row["format"])
        if key not in best or _page(row) < _page(best[key]):
            best[key] = row
    return list(best.values())


def _page(row: Row) -> int:
    page = place(row)[1]
    return 0 if page == NO_PAGE else int(page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    documents, page = load(), PAGE.read_text("utf-8")
    if not arguments.check:
        page = rewrite(page, blocks(documents))
        PAGE.write_text(page, "utf-8")
        if blocks(documents)["picture"] != NOTHING:
            draw(documents)
    found = problems(page, documents, source_digests())
    print("\n".join(found) or "docs/performance.md stands for these sources and results")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
