# SPDX-License-Identifier: Apache-2.0
"""From the results to the tables and the picture of docs/choosing_a_format.md.

    python scripts/formats.py            # rewrite the tables and docs/choosing_a_format.svg
    python scripts/formats.py --check    # say what differs, and exit with 1

Every figure of the page stands between two comments, `<!-- quality -->` and `<!-- /quality -->`,
and comes from benchmarks/results/ or from the formats' own rows. tests/unit/test_formats_docs.py
runs the check.
"""

import argparse
import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import kernel_sources
from fastkv import CacheSpec
from fastkv.backends.kernels import KERNELS
from fastkv.ops.cuda.jit import source_digests
from fastkv.quant import QUANT_SPECS, QuantSpec
from marked_page import line, number, rewrite, rule, shown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "choosing_a_format.md"
PICTURE = ROOT / "docs" / "choosing_a_format.svg"
BLOCKS = ("decision", "runs", "quality", "time")
#: The shape whose time stands in the decision table: a large batch, bound by the memory's rate.
MAIN = "64x8192 Hq32 Hkv8 D128 P16"
#: When to take a format, in the order of the table.
ADVICE = {
    "none": "memory is no concern, or as what the others are compared with",
    "block_wise_fp8": "you cannot calibrate: the default of the quantized formats",
    "cache_int8": "you can calibrate on text like yours: most accurate in 8 bits here",
    "cache_fp8": "your checkpoint or engine already has fp8 scales",
    "cache_int4_zp": "memory decides, and your own evaluation bears it",
}

#: What puts it right.
AGAIN = "python scripts/formats.py"

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def load(folder: Path = RESULTS) -> dict[str, Document]:
    """The two results that the page rests on."""
    paths = {"quality": "eval_smollm2.json", "time": "decode.json"}
    return {name: json.loads((folder / path).read_text("utf-8")) for name, path in paths.items()}


def blocks(documents: Mapping[str, Document]) -> dict[str, str]:
    """The text of every block of the page."""
    return {
        "decision": decision(documents),
        "runs": runs(documents),
        "quality": quality(documents["quality"]["rows"]),
        "time": time(documents["time"]["rows"]),
    }


def decision(documents: Mapping[str, Document]) -> str:
    """One line a format: what it costs, what it needs, when to take it."""
    kl = {row["format"]: row for row in documents["quality"]["rows"]}
    times = {row["format"]: row["us"] for row in documents["time"]["rows"] if row["shape"] == MAIN}
    head = ("Format", "Bytes", "KL", "Time", "Calibration", "GPU", "Take it when")
    lines = [line(head), rule(len(head))]
    for name, advice in ADVICE.items():
        quant = QUANT_SPECS[name]
        lines.append(
            line(
                (
                    f"`{name}`",
                    f"{size(name) / size('none'):.2f}",
                    divergence(kl[name]),
                    f"{times[name] / times['none']:.2f}",
                    calibration(quant),
                    f"sm_{least_sm(quant)}",
                    advice,
                )
            )
        )
    return "\n".join(lines)


def divergence(row: Row) -> str:
    """A KL of 0 is that of the float32 cache with itself, which says nothing of bf16."""
    return f"{row['kl']:.4f}" if row["kl"] else f"0 ({row['dtype']})"


def size(name: str) -> float:
    """Bytes a token of a layer with 8 KV heads of 128, beside a bf16 `none`."""
    return CacheSpec(1, 8, 128, 16, name).bytes_per_token()


def calibration(quant: QuantSpec) -> str:
    """What a format needs before it serves."""
    if not quant.needs_static:
        return "–"
    layouts = " or ".join(layout.value for layout in quant.granularities)
    return f"scales{' and zero points' if quant.needs_zp else ''} per {layouts}"


def least_sm(quant: QuantSpec) -> int:
    """The least compute capability whose kernels serve a format."""
    cuda = KERNELS["cuda"]
    return max(cuda.min_sm, cuda.min_sm_by_storage.get(quant.storage or "", 0))


def runs(documents: Mapping[str, Document]) -> str:
    """What was measured, on what."""
    model, gpu = documents["quality"], documents["time"]
    return "\n".join(
        (
            f"- **Quality**: `{model['model']}` reading `{model['text']}`, tokens {model['score']} "
            f"scored, scales from tokens {model['calibrate']}, headroom {model['headroom']:g}, "
            f"backend `{model['backend']}`, {model['chunk']} tokens a step, over the NumPy "
            "reference on a CPU.",
            f"- **Time**: one layer's attention on one {gpu['device']}, kernel sources "
            f"{kernel_sources.listed([gpu])}, commit `{gpu['commit']}`.",
        )
    )


def quality(rows: list[Row]) -> str:
    """The table of the whole model."""
    head = ("Format", "Stores", "Scales", "B/token", "Once, B", "KL", "Perplexity", "Top-1 %")
    lines = [line(head), rule(len(head))]
    for row in rows:
        lines.append(
            line(
                (
                    f"`{row['format']}`",
                    row["dtype"],
                    f"per {row['granularity']}" if row["granularity"] else "–",
                    f"{row['bytes_per_token']:,}",
                    f"{row['fixed_bytes']:,}" if row["fixed_bytes"] else "–",
                    f"{row['kl']:.5f}" if row["kl"] else "0",
                    f"{row['perplexity']:.3f}",
                    f"{100 * row['top1']:.1f}",
                )
            )
        )
    return "\n".join(lines)


def time(rows: list[Row]) -> str:
    """One line a shape: each format's time, and how many times as fast as `none` it is."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    lines = [line(("Shape", *(f"`{name}`" for name in formats))), rule(1 + len(formats))]
    for shape, found in by_shape(rows).items():
        cells = (cell(found.get(name), found["none"]) for name in formats)
        lines.append(line((words(shape), *cells)))
    return "\n".join(lines)


def by_shape(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Microseconds of each format, by shape."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["shape"], {})[row["format"]] = row["us"]
    return found


def cell(us: float | None, none: float) -> str:
    return "–" if us is None else f"{number(us)} µs<br>{none / us:.2f} ×"


def words(shape: str) -> str:
    """A shape without its page size, which is one for all."""
    return re.sub(r" P16$", "", shape).replace("x", " × ", 1)


def problems(
    page: str,
    documents: Mapping[str, Document],
    digests: Mapping[str, str],
    picture: Path = PICTURE,
) -> list[str]:
    """What on the page, or in its picture, is not as the results or the kernels have it."""
    there, wanted = shown(page, BLOCKS), blocks(documents)
    found = kernel_sources.stale("benchmarks/results/decode.json", documents["time"], digests)
    found += [
        f"docs/choosing_a_format.md: block {name} is not what the results say ({AGAIN})"
        for name in BLOCKS
        if there[name] != wanted[name]
    ]
    if points(documents) not in picture.read_text("utf-8"):
        found.append(f"docs/choosing_a_format.svg: not drawn from these results ({AGAIN})")
    return found


def by_hand(page: str) -> str:
    """The page without its blocks and its code."""
    page = rewrite(page, dict.fromkeys(BLOCKS, ""))
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def draw(documents: Mapping[str, Document], path: Path = PICTURE) -> None:
    """KL against bytes a token of the model, and the time of attention against that of `none`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    styles = {name: {"color": f"C{i}", "marker": "osD^v"[i]} for i, name in enumerate(QUANT_SPECS)}
    with rc_context({"svg.hashsalt": "fastkv", "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _draw_quality(left, documents["quality"]["rows"], styles)
        _draw_time(right, documents["time"]["rows"], styles)
        figure.savefig(path, metadata={"Date": None, "Description": points(documents)})


def points(documents: Mapping[str, Document]) -> str:
    """What the picture shows, as a digest that the file carries: an old picture is found by it."""
    axes = {"quality": ("format", "bytes_per_token", "kl"), "time": ("format", "shape", "us")}
    drawn = [[[row[key] for key in axes[of]] for row in documents[of]["rows"]] for of in axes]
    return f"figures {sha256(json.dumps(drawn).encode()).hexdigest()[:16]}"


def _draw_quality(axes: Any, rows: list[Row], styles: Mapping[str, Mapping[str, str]]) -> None:
    for row in rows:
        name, style = row["format"], styles[row["format"]]
        if row["kl"]:
            axes.scatter(row["bytes_per_token"], row["kl"], s=60, label=name, **style)
        else:  # no place on a logarithmic axis
            label = f"{name} ({row['dtype']}), KL 0"
            axes.axvline(row["bytes_per_token"], color=style["color"], linestyle="--", label=label)
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("bytes a token, all layers of the model")
    axes.set_ylabel("KL from the float32 cache, nats a token")
    axes.grid(which="both", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="small")


def _draw_time(axes: Any, rows: list[Row], styles: Mapping[str, Mapping[str, str]]) -> None:
    shapes = by_shape(rows)
    for name, style in styles.items():
        ratios = [(found[name] / found["none"], y) for y, found in enumerate(shapes.values())]
        axes.scatter(*zip(*ratios, strict=True), s=30, label=name, **style)
    axes.set_yticks(range(len(shapes)), [words(shape) for shape in shapes])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("time of attention / time with none in bf16")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


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
        draw(documents)
    found = problems(page, documents, source_digests())
    print("\n".join(found) or "docs/choosing_a_format.md is what the results say")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
