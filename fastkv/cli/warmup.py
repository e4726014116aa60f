# SPDX-License-Identifier: Apache-2.0
"""`fastkv warmup`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkv import __version__
from fastkv.cli.output import JsonFile, console, progress_console, require_folder, table, write_json
from fastkv.quant import QUANT_SPECS
from fastkv.spec import CacheSpec
from fastkv.warming import warmup as warm_up

if TYPE_CHECKING:
    from fastkv.warming import Warmed


def warmup(
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads of this rank.")],
    query_heads: Annotated[int, typer.Option(min=1, help="Query heads of this rank.")],
    head_dim: Annotated[int, typer.Option(min=1, help="D.")] = 128,
    page_size: Annotated[int, typer.Option(min=1, help="P.")] = 64,
    quant: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated; unset: {', '.join(QUANT_SPECS)}."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What `none` stores.")] = "bfloat16",
    q_dtype: Annotated[str, typer.Option(help="Of qkv and out: bfloat16 or float16.")] = "bfloat16",
    scale_dtype: Annotated[str, typer.Option(help="Of the paged scales.")] = "float32",
    static_dtype: Annotated[str, typer.Option(help="Of the static scales.")] = "float32",
    granularity: Annotated[
        str | None, typer.Option(help="Of the static scales: head or channel.")
    ] = None,
    rotary_dim: Annotated[
        int | None, typer.Option(help="Of the rope; unset is D, 0 is no rope.")
    ] = None,
    interleaved: Annotated[bool, typer.Option("--interleaved", help="Rope of pairs.")] = False,
    qk_norm: Annotated[bool, typer.Option("--qk-norm", help="Layers have QK-norm.")] = False,
    norm_after_rope: Annotated[
        bool, typer.Option("--norm-after-rope", help="... and it follows the rope.")
    ] = False,
    device: Annotated[str, typer.Option(help="cuda:0, cuda:1, …")] = "cuda:0",
    json_file: JsonFile = None,
) -> None:
    """Compile the kernels of a cache ahead of the first request.

    Every op is called once on a tiny batch for decode, draft and prefill rows. The binaries stay
    on disk (`CUPY_CACHE_DIR`), so that a server's first request only loads them. Exits with 1 when
    the kernels do not serve the cache, with 2 when there is no GPU or a package is missing.

    **Examples**

    * `fastkv warmup --kv-heads 8 --query-heads 32 --quant cache_int8`
    * `fastkv warmup --kv-heads 8 --query-heads 64 --head-dim 64 --page-size 16 --json -`
    """
    require_folder(json_file)
    formats = quant or list(QUANT_SPECS)
    spec = CacheSpec(
        len(formats), kv_heads, head_dim, page_size, formats, dtype, scale_dtype=scale_dtype
    )
    with _progress() as progress:
        task = progress.add_task("starting", total=None)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        rows = warm_up(
            spec,
            num_query_heads=query_heads,
            dtype=q_dtype,
            device=device,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            qk_norm=qk_norm,
            norm_after_rope=norm_after_rope,
            granularity=granularity,
            static_dtype=static_dtype,
            progress=show,
        )
    if json_file is None or str(json_file) != "-":
        _show(rows)
    if json_file is not None:
        write_json(json_file, {"fastkv": __version__, "rows": [asdict(row) for row in rows]})


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=progress_console(), transient=True)


def _show(rows: "list[Warmed]") -> None:
    numeric = ("kernels", "s")
    made = table("Kernels", "op", "format", *numeric, numeric=numeric)
    for row in rows:
        made.add_row(row.op, row.format or "–", f"{row.kernels}", f"{row.seconds:.2f}")
    out = console()
    out.print(made)
    total = sum(row.seconds for row in rows)
    out.print(f"{sum(row.kernels for row in rows)} kernels in {total:.1f} s")
