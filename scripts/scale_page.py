# SPDX-License-Identifier: Apache-2.0
"""From the measured transfers to the tables of docs/transfer.md and docs/scale.md.

    python scripts/scale_page.py            # rewrite the tables
    python scripts/scale_page.py --check    # say what differs, and exit with 1

The figures come from benchmarks/results/transfer.json, which `bench_transfer.py` wrote, and from
`CacheSpec`. tests/unit/test_scale_docs.py runs the check.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkv import CacheSpec
from marked_page import rewrite, shown, table

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "transfer.json"
PAGES = {
    ROOT / "docs" / "transfer.md": ("transfer run", "parts", "requests"),
    ROOT / "docs" / "scale.md": ("per token", "moves", "fleet"),
}
AGAIN = "python scripts/scale_page.py"

# What docs/scale.md assumes; the page says each in words.
LAYERS, HEADS, DIM, PAGE = 32, 8, 128, 16  # the shape of Llama 3 8B
PROMPT, RATE = 4000, 10_000  # tokens a prompt; prompt tokens a second that a GPU computes
SHARED, LINK = 0.5, 50  # of a prompt's tokens that others had; GB/s of a host's link, 8 GPUs
HOUR = 3600
FORMATS = ("none", "cache_fp8", "block_wise_fp8", "cache_int4_zp")
FLEETS = (1, 100, 10_000)

Document = Mapping[str, Any]


def spec_of(quant: str) -> CacheSpec:
    return CacheSpec(LAYERS, HEADS, DIM, PAGE, quant)


def blocks(document: Document) -> dict[str, str]:
    """The text of every block of every page."""
    rows = document["rows"]
    return {
        "transfer run": run(document),
        "parts": parts([row for row in rows if row["kind"] == "part"]),
        "requests": requests([row for row in rows if row["kind"] == "request"]),
        "per token": per_token(),
        "moves": moves(document),
        "fleet": fleet(),
    }


def run(document: Document) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"{document['device']}, {document['cores']} cores, two processes on loopback; commit "
        f"`{document['commit']}`; {versions}."
    )


def parts(rows: list[Document]) -> str:
    """Speed by the size of a block's part."""
    head = ("UCX", "Part", "Checksums", "NIXL alone, GB/s", "push", "pull")
    lines = []
    for row in rows:
        cells = (
            row["transport"],
            f"{row['part_bytes'] // 1024} KiB",
            "yes" if row["checksums"] else "no",
            f"{row['raw_GBps']:.2f}",
            f"{row['push_GBps']:.2f} ({row['push_ratio']:.2f})",
            f"{row['pull_GBps']:.2f} ({row['pull_ratio']:.2f})",
        )
        lines.append(cells)
    return table(head, lines)


def requests(rows: list[Document]) -> str:
    """One request in several formats."""
    head = ("UCX", "Format", "MB", "NIXL alone, ms", "push, ms", "of `none`")
    lines = []
    for row in rows:
        whole = next(
            r["push_s"] for r in rows if (r["format"], r["transport"]) == ("none", row["transport"])
        )
        cells = (
            row["transport"],
            f"`{row['format']}`",
            f"{row['bytes'] / 1e6:.0f}",
            f"{1e3 * row['raw_s']:.0f}",
            f"{1e3 * row['push_s']:.0f}",
            f"{row['push_s'] / whole:.2f}",
        )
        lines.append(cells)
    return table(head, lines)


def per_token() -> str:
    head = ("Format", "Bytes a token", "MB a block", "MB a prompt")
    lines = []
    for quant in FORMATS:
        token = spec_of(quant).bytes_per_token()
        cells = (f"{token:,}", f"{token * PAGE / 1e6:.2f}", f"{token * PROMPT / 1e6:,.0f}")
        lines.append((f"`{quant}`", *cells))
    return table(head, lines)


def moves(document: Document) -> str:
    """What one pair of processes was measured at, in blocks of this model."""
    head = ("UCX", "Format", "GB/s", "Blocks a second", "ms a prompt")
    lines = []
    for row in document["rows"]:
        if row["kind"] == "request":
            token = spec_of(row["format"]).bytes_per_token()
            rate = row["push_GBps"] * 1e9
            cells = (
                row["transport"],
                f"`{row['format']}`",
                f"{row['push_GBps']:.2f}",
                f"{rate / (token * PAGE):,.0f}",
                f"{1e3 * token * PROMPT / rate:,.0f}",
            )
            lines.append(cells)
    return table(head, lines)


def fleet() -> str:
    """Traffic and store of a fleet of prefill GPUs."""
    head = ("Prefill GPUs", "Format", "GB/s to decode", "Sent, of the links", "GB/s from the store")
    head = (*head, "Store of an hour, TB")
    lines = []
    for gpus in FLEETS:
        for quant in FORMATS:
            token = spec_of(quant).bytes_per_token()
            # Tokens that the store had are not computed, so a GPU serves more of them.
            served = RATE / (1 - SHARED) * gpus
            out, hits, new = served * token, served * SHARED * token, RATE * gpus * token
            links = -(-gpus // 8) * LINK * 1e9
            cells = (
                f"{gpus:,}",
                f"`{quant}`",
                f"{out / 1e9:,.1f}",
                f"{100 * (out + new) / links:.1f} %",
                f"{hits / 1e9:,.1f}",
                f"{new * HOUR / 1e12:,.1f}",
            )
            lines.append(cells)
    return table(head, lines)


def problems(pages: Mapping[Path, str], document: Document) -> list[str]:
    """Blocks that are not what the result says."""
    wanted = blocks(document)
    return [
        f"{path.name}: block {name} is not what the result says ({AGAIN})"
        for path, names in PAGES.items()
        for name in names
        if shown(pages[path], names)[name] != wanted[name]
    ]


def load() -> tuple[dict[Path, str], Document]:
    return {path: path.read_text("utf-8") for path in PAGES}, json.loads(RESULT.read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    pages, document = load()
    if not arguments.check:
        texts = blocks(document)
        for path, names in PAGES.items():
            pages[path] = rewrite(pages[path], {name: texts[name] for name in names})
            path.write_text(pages[path], "utf-8")
    found = problems(pages, document)
    print("\n".join(found) or "the pages are what the result says")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
