# SPDX-License-Identifier: Apache-2.0
"""`fastkv select`."""

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from fastkv.backends import FEATURES, name_from_environment, select_backend
from fastkv.backends.kernels import Device
from fastkv.cli.output import JsonFile, console, table, write_json
from fastkv.errors import SelectionError
from fastkv.spec import CacheSpec


def select(
    backend: Annotated[
        str | None,
        typer.Option(
            help="append, flash, flash_mask or auto; unset takes FASTKV_ATTENTION_BACKEND, or auto."
        ),
    ] = None,
    quant: Annotated[str, typer.Option(help="Format of the cache.")] = "none",
    device: Annotated[
        str, typer.Option(help="cpu, or cuda:90 for a GPU of compute capability 9.0.")
    ] = "cpu",
    feature: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated: {', '.join(FEATURES)}."),
    ] = None,
    head_dim: Annotated[int, typer.Option(help="D.")] = 128,
    page_size: Annotated[int, typer.Option(help="P.")] = 64,
    group: Annotated[
        int | None, typer.Option(help="G, query heads a KV head; unset leaves it to the ops.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="What `none` stores.")] = "bfloat16",
    json_file: JsonFile = None,
) -> None:
    """Show which backend and kernels would serve a request, and why not the others.

    Exits with 1 when nothing serves it, with 2 when a name is unknown.

    **Examples**

    * `fastkv select`
    * `fastkv select --quant block_wise_fp8 --feature window --feature sinks`
    * `fastkv select --device cuda:80 --quant cache_fp8`
    * `fastkv select --backend flash --feature mask_offsets_on_prefill`
    """
    name = name_from_environment() if backend is None else backend
    spec = CacheSpec(1, 1, head_dim, page_size, quant, dtype)
    result = outcome(name, spec, Device.of(device), feature or (), group)
    request = {"asked": name, "format": quant, "device": device, "features": list(feature or ())}
    if json_file is None or str(json_file) != "-":
        _show({**request, **result})
    if json_file is not None:
        write_json(json_file, {**request, **result})
    if result["kernel"] is None:
        raise typer.Exit(1)


def outcome(
    name: str,
    spec: CacheSpec | str,
    device: Device,
    features: Iterable[str] = (),
    group: int | None = None,
) -> dict[str, Any]:
    """What selection answers, a refusal included: backend, kernel (None: refused), reason."""
    if isinstance(spec, str):
        spec = CacheSpec(1, 1, 128, 64, spec)
    heads = None if group is None else group * spec.num_kv_heads
    try:
        choice = select_backend(name, spec, device, features, num_query_heads=heads)
    except SelectionError as error:
        reason = "; ".join(dict.fromkeys(reason for _, reason in error.rejected))
        return {"backend": name, "kernel": None, "reason": reason, "rejected": error.rejected}
    return {
        "backend": choice.backend,
        "kernel": choice.kernel,
        "reason": choice.reason,
        "rejected": choice.rejected,
    }


def _show(result: dict[str, Any]) -> None:
    out = console()
    if result["kernel"] is None:
        out.print(f"nothing serves {result['asked']!r} on {result['device']}", style="red")
    else:
        out.print(f"{result['backend']} on {result['kernel']}: {result['reason']}")
    if result["rejected"]:
        rejected = table("Rejected", "backend", "reason")
        for name, reason in result["rejected"]:
            rejected.add_row(name, reason)
        out.print(rejected)
