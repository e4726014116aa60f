# SPDX-License-Identifier: Apache-2.0
"""From the comparison with QuantizedCache to the table and the picture of docs/eval.md.

    python scripts/eval_page.py            # rewrite the table and docs/eval_transformers.svg
    python scripts/eval_page.py --check    # say what differs, and exit with 1

The figures come from benchmarks/results/eval_transformers.json, which `fastkv eval` wrote.
tests/unit/eval/test_eval_page.py runs the check.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marked_page import rewrite, shown, table

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "eval_transformers.json"
PAGE = ROOT / "docs" / "eval.md"
PICTURE = ROOT / "docs" / "eval_transformers.svg"
BLOCKS = ("peers run", "peers")
AGAIN = "python scripts/eval_page.py"

Document = Mapping[str, Any]


def blocks(document: Document) -> dict[str, str]:
    """The text of every block."""
    return {"peers run": run(document), "peers": peers(document)}


def run(document: Document) -> str:
    """What was run, on what."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    start, stop = (int(part) for part in document["score"].split(":"))
    return (
        f"`{document['model']}` in transformers, on a CPU; tokens {start}–{stop - 1} of "
        f"`{document['text']}`, the first {document['prefill']:,} of them the prefill, which is "
        f"not scored; {document['chunk']} tokens a step; scales from tokens "
        f"{document['calibrate']}; commit `{document['commit']}`; {versions}. Perplexity over the "
        f"float32 cache {document['float32_perplexity']:.3f}."
    )


def peers(document: Document) -> str:
    """One line a cache."""
    head = ("Cache", "Scales", "Exact", "B/token", "Held", "KL", "Perplexity", "Top-1 %")
    lines = []
    for row in document["rows"]:
        lines.append(
            (
                f"`{row['format']}`",
                scales(row),
                exact(row),
                f"{row['bytes_per_token']:,}",
                f"{row['held_per_token']:,.0f}",
                f"{row['kl']:.4f}" if row["kl"] > 1e-7 else "0",
                f"{row['perplexity']:.3f}",
                f"{100 * row['top1']:.1f}",
            )
        )
    return table(head, lines)


def scales(row: Document) -> str:
    if row["granularity"] is None:
        return "–"
    return f"per {row['granularity']}: {row['calibration'].replace('|', chr(92) + '|')}"


def exact(row: Document) -> str:
    """What is attended to in full precision."""
    parts = [f"first {row['exact_prefill']:,}"] if row["exact_prefill"] else []
    if row["window"]:
        parts.append(f"last {row['window']}")
    return ", ".join(parts) or "–"


def problems(page: str, document: Document) -> list[str]:
    """Blocks that are not what the result says."""
    there, wanted = shown(page, BLOCKS), blocks(document)
    return [
        f"docs/eval.md: block {name} is not what the result says ({AGAIN})"
        for name in BLOCKS
        if there[name] != wanted[name]
    ]


def draw(document: Document) -> None:
    from matplotlib import rc_context

    from fastkv.eval.measure import Row
    from fastkv.eval.plot import draw as draw_rows

    os.environ["SOURCE_DATE_EPOCH"] = "0"
    rows = [Row(**row) for row in document["rows"]]
    with rc_context({"svg.hashsalt": "fastkv", "svg.fonttype": "none"}):
        draw_rows(rows, f"{document['model']}, {document['text']}", PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    document, page = json.loads(RESULT.read_text("utf-8")), PAGE.read_text("utf-8")
    if not arguments.check:
        page = rewrite(page, blocks(document))
        PAGE.write_text(page, "utf-8")
        draw(document)
    found = problems(page, document)
    print("\n".join(found) or "docs/eval.md is what the result says")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
