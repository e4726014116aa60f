# SPDX-License-Identifier: Apache-2.0
"""`fastkv plan`."""

import math
import re
import sys
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastkv import __version__
from fastkv import plan as capacity
from fastkv.cli.output import JsonFile, console, require_folder, table, write_json
from fastkv.dtypes import ITEMSIZE, canonical_float
from fastkv.engine_config import MAX_LAYERS, ModelConfig, read_config
from fastkv.errors import SpecError
from fastkv.quant import QUANT_SPECS

if TYPE_CHECKING:
    from rich.table import Table

GIB = capacity.GIB
_SIZES = {"": 1, "K": 1024, "M": 1024**2}
_COUNTS = {"": 1, "M": 10**6, "B": 10**9}


def plan(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="A Hugging Face config.json, or its folder."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=MAX_LAYERS, help="Layers, without a config.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="KV heads of the model, without a config.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="D, without a config.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="What `none` stores; unset is the config's, or bfloat16.")
    ] = None,
    scale_dtype: Annotated[str, typer.Option(help="Of the paged scales.")] = "float32",
    page_size: Annotated[int, typer.Option(min=1, help="P.")] = 64,
    tp: Annotated[int, typer.Option(min=1, help="Ranks of the tensor-parallel group.")] = 1,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Of one GPU; unset counts bytes only.")
    ] = None,
    weights: Annotated[
        float | None, typer.Option(metavar="GIB", help="Weights of the whole model.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Instead of --weights: 8.03B, 135M, 134515008.")
    ] = None,
    param_bytes: Annotated[
        float | None, typer.Option(help="Bytes of a parameter; unset is the dtype's.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(help="Share of the GPU for weights and cache.")
    ] = 0.9,
    contexts: Annotated[
        str, typer.Option(help="Tokens of the requests to count, k is 1024.")
    ] = "4k,32k,128k",
    quant: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this format; may be repeated: {', '.join(QUANT_SPECS)}."),
    ] = None,
    windowed: Annotated[
        bool, typer.Option("--windowed", help="Sliding layers hold only their window's pages.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Count how many tokens and requests fit in a GPU's memory, in each format.

    The shape comes from a model's config or from --layers, --kv-heads and --head-dim. All numbers
    are of one rank; scales and zero points are counted. Exits with 1 when no cache fits, with 2
    when the config lacks a key or describes a cache that fastkv does not have.

    **Examples**

    * `fastkv plan Llama-3-8B/config.json --gpu-memory 80 --params 8.03B`
    * `fastkv plan Llama-3-70B --tp 8 --gpu-memory 80 --weights 131.4 --contexts 8k,64k`
    * `fastkv plan --layers 32 --kv-heads 8 --head-dim 128`
    * `fastkv plan config.json --json - | jq '.rows[] | {format, bytes_per_token}'`
    """
    require_folder(json_file)
    shape = {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}
    model = _model(config, shape, dtype)
    memory = _memory(model, gpu_memory, weights, params, param_bytes, utilization)
    try:
        planned = capacity.plan(
            model,
            memory=memory,
            page_size=page_size,
            tp=tp,
            contexts=_contexts(contexts),
            formats=quant or QUANT_SPECS,
            scale_dtype=scale_dtype,
            windowed=windowed,
        )
    except capacity.CapacityError as error:
        print(f"fastkv: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    document = _document(config, model, memory, planned, page_size=page_size, tp=tp)
    if json_file is None or str(json_file) != "-":
        _show(document, planned)
    if json_file is not None:
        write_json(json_file, document)


def _wrong(option: str, expected: str, got: object) -> SpecError:
    return SpecError("plan", option, expected=expected, got=str(got))


def _model(config: Path | None, shape: dict[str, int | None], dtype: str | None) -> ModelConfig:
    """The shape, from the config or from the options, never mixed."""
    given = [option for option, value in shape.items() if value is not None]
    name = "bfloat16" if dtype is None else canonical_float(dtype)
    if name is None:
        raise _wrong("--dtype", "bfloat16, float16 or float32", repr(dtype))
    if config is not None:
        if given:
            raise _wrong(given[0], "a config or the shape, not both", config)
        model = read_config(config)
        return model if dtype is None else replace(model, dtype=name)
    missing = [option for option, value in shape.items() if value is None]
    if missing:
        raise _wrong(missing[0], f"a config, or {', '.join(shape)}", "neither")
    num_layers, num_kv_heads, head_dim = (value for value in shape.values() if value is not None)
    return ModelConfig(num_layers, num_kv_heads, head_dim, name)


def _memory(
    model: ModelConfig,
    gpu: float | None,
    weights: float | None,
    params: str | None,
    param_bytes: float | None,
    utilization: float,
) -> capacity.Memory | None:
    if gpu is None:
        for option, value in (("--weights", weights), ("--params", params)):
            if value is not None:
                raise _wrong(option, "--gpu-memory too", "none")
        return None
    if (weights is None) == (params is None):
        got = "neither" if weights is None else "both"
        raise _wrong("--weights", "--weights or --params (0 counts none)", got)
    if params is None:
        taken = _bytes("--weights", weights, GIB)
    else:
        size = ITEMSIZE[model.dtype] if param_bytes is None else param_bytes
        taken = _bytes("--param-bytes", size, _count("--params", params, _COUNTS))
    if not 0 < utilization <= 1:
        raise _wrong("--utilization", "above 0, at most 1", utilization)
    return capacity.Memory(_bytes("--gpu-memory", gpu, GIB), taken, utilization)


def _bytes(option: str, value: float | None, unit: int) -> int:
    if value is None or not 0 <= value <= 2**20:  # also NaN
        raise _wrong(option, "a number from 0 to 1048576", value)
    return math.ceil(value * unit)


def _count(option: str, text: str, units: dict[str, int]) -> int:
    """A count with a unit: 8.03B, 32k."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([a-z]?)", text.strip(), re.IGNORECASE)
    if not found or found[2].upper() not in units:
        names = ", ".join(filter(None, units))
        raise _wrong(option, f"a number, with {names} or without", repr(text))
    return round(Fraction(found[1]) * units[found[2].upper()])


def _contexts(text: str) -> list[int]:
    return [_count("--contexts", part, _SIZES) for part in text.split(",")]


def _document(
    source: Path | None,
    model: ModelConfig,
    memory: capacity.Memory | None,
    planned: capacity.Plan,
    **settings: int,
) -> dict[str, Any]:
    return {
        "fastkv": __version__,
        "config": None if source is None else str(source),
        "layers": model.num_layers,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": model.dtype,
        **settings,
        "memory": None if memory is None else asdict(memory),
        "cache_bytes": planned.cache_bytes,
        "notes": list(planned.notes),
        "rows": [asdict(row) for row in planned.rows],
    }


def _show(document: dict[str, Any], planned: capacity.Plan) -> None:
    out = console()
    shape = "{layers} layers, {kv_heads} KV heads, D {head_dim}, {dtype}, P {page_size}, TP {tp}"
    out.print(shape.format_map(document))
    if planned.cache_bytes is not None:
        out.print(f"{planned.cache_bytes / GIB:.2f} GiB a rank for the cache")
    out.print(_table(planned))
    if any(row.configured for row in planned.rows):
        out.print("* the format that the config asks for")
    static = ", ".join(
        f"{row.format} {row.static_bytes}" for row in planned.rows if row.static_bytes
    )
    if static:
        out.print(f"Bytes of static scales and zero points, once: {static}.")
    for note in planned.notes:
        out.print(note)


def _table(planned: capacity.Plan) -> "Table":
    """One row a format; a context's column counts requests, or without a memory their size."""
    counted = planned.cache_bytes is not None
    lengths = {n: _short(n) for n in planned.rows[0].request_bytes} if planned.rows else {}
    capacities = ("pages", "tokens") if counted else ()
    numeric = ("B/token", "x", *capacities, *lengths.values())
    title = "Requests that fit" if counted else "GiB of one request"
    made = table(title, "format", *numeric, numeric=numeric)
    for row in planned.rows:
        longest = [row.pages, row.tokens] if counted else []
        requests = row.requests or {}
        cells = [
            f"{requests[n]}" if counted else f"{row.request_bytes[n] / GIB:.3f}" for n in lengths
        ]
        made.add_row(
            f"{row.format} *" if row.configured else row.format,
            f"{row.bytes_per_token}",
            f"{row.compression:.2f}",
            *("no limit" if value is None else f"{value}" for value in longest),
            *cells,
        )
    return made


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens}"
