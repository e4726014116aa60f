# SPDX-License-Identifier: Apache-2.0
"""The rows of a run, printed as they come and written as JSON."""

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastkv
from gpu import ceilings
from gpu.data import FORMATS, Format, relative_difference
from gpu.timing import GraphTimer, Timer, Timing

ROOT = Path(__file__).resolve().parents[2]
OWN = "fastkv"
PAGES = (16, 64)


@dataclass(slots=True)
class Report:
    """One run of one benchmark.

    Attributes:
        name: of the benchmark.
        arguments: its command line.
        timer: the clock.
        device: where the data lies.
        kernels: the CUDA kernels that it times.
        rows: as they are written; `ratio` is peer_us / us.
        errors: contenders that have no time, and why.
        ceilings: what the memory gives in this run.
        known: peers' figures of an earlier run, by op, format and shape.
    """

    name: str
    arguments: argparse.Namespace
    timer: Timer
    device: torch.device
    kernels: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    known: dict[tuple[str, str, str], dict[str, Timing]] = field(default_factory=dict)

    @property
    def pages(self) -> tuple[int, ...]:
        """Page sizes to measure."""
        return PAGES[:1] if self.arguments.quick else PAGES

    @property
    def formats(self) -> list[Format]:
        """Formats to measure."""
        return [FORMATS[name] for name in self.arguments.formats]

    @property
    def with_peers(self) -> bool:
        """Whether to time peers in this run."""
        return not self.arguments.no_peers and self.arguments.peer_figures is None

    def skips(self, where: str, peer: str) -> bool:
        """Whether `--skip-peers` leaves a peer out, which is told among the errors."""
        pattern = self.arguments.skip_peers
        if pattern is None or not re.search(pattern, peer):
            return False
        self.errors.append(f"{where} {peer}: left out of this run by --skip-peers")
        return True

    def wants(self, shape: str) -> bool:
        """Whether `--rows` lets a row of this shape through."""
        return self.arguments.rows is None or bool(re.search(self.arguments.rows, shape))

    def run(self, cases: Iterable[Any], run_case: Callable[["Report", Any], None]) -> "Report":
        """What the memory gives, then every case; written after each, and returned."""
        if self.device.type == "cuda":
            self.ceilings = ceilings.measure(self.timer, self.device)
        print(self.ceilings, flush=True)
        for case in cases:
            run_case(self, case)
            self.write()
        self.write()
        return self

    def compare(self, where: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
        """Tell a result that is farther from fastkv's than `bound`, in the norm."""
        off = relative_difference(got, want)
        if not off < bound:
            self.failed(where, ValueError(f"differs from fastkv by {off:.3g} of the norm"))

    def measure(self, contenders: Mapping[str, Any], where: str) -> dict[str, Timing]:
        """Times of the contenders that have one; the others are told and kept as errors."""
        found = {}
        for name, result in self.timer.measure(contenders).items():
            if isinstance(result, Timing):
                found[name] = result
            else:
                self.failed(f"{where} {name}", result)
        return found

    def attempt(self, where: str, make: Callable[[], Any]) -> Any:
        """What `make` returns; None, and an error told, if it raises."""
        try:
            return make()
        except Exception as error:
            self.failed(where, error)
            return None

    def failed(self, where: str, error: Exception) -> None:
        """Keep an error and go on."""
        text = f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.errors.append(text)
        print(f"  FAILED {text}", flush=True)

    def add(
        self,
        op: str,
        fmt: str,
        shape: str,
        own: Timing,
        size: int,
        peers: Mapping[str, Timing] | None = None,
        **more: Any,
    ) -> None:
        """Add a row against the fastest of `peers` and print it."""
        peers = peers or self.known.get((op, fmt, shape), {})
        peer = min(peers, key=lambda name: peers[name].us) if peers else None
        best = peers[peer] if peer else None
        row: dict[str, Any] = {
            "op": op,
            "format": fmt,
            "shape": shape,
            "us": own.us,
            "iqr_us": own.iqr,
            "mode": own.mode,
            "bytes": size,
            "TBps": size / own.us / 1e6,
            "peer": peer,
            "peer_us": best.us if best else None,
            "peer_iqr_us": best.iqr if best else None,
            "ratio": best.us / own.us if best else None,
            "peers": {name: time.us for name, time in peers.items()},
            **more,
        }
        self.rows.append(row)
        print(line(row), flush=True)

    def document(self) -> dict[str, Any]:
        """Everything, as it is written."""
        return {
            "benchmark": self.name,
            "command": " ".join(["python", *map(_relative, sys.argv)]),
            "commit": self.arguments.commit or commit(),
            "device": device_name(self.device),
            **about_sources(self.kernels),
            "versions": versions(),
            "ceilings": self.ceilings,
            "peer_figures": _relative(str(self.arguments.peer_figures or "this run")),
            "rows": self.rows,
            "errors": self.errors,
        }

    def write(self) -> None:
        """Write the JSON, if asked for; called after every case, so that a cut run leaves some."""
        path = self.arguments.json
        if path is not None:
            path.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")


def line(row: Mapping[str, Any]) -> str:
    """A row on one line."""
    text = f"{row['op']:<17}{row['format']:<20}{row['shape']:<42}{row['us']:>9.2f} us"
    text += f" ±{row['iqr_us']:<6.2f}"
    if row["bytes"]:
        text += f"{row['TBps']:>6.2f} TB/s"
    if row.get("TFLOPs"):
        text += f"{row['TFLOPs']:>6.0f} TFLOP/s"
    if row["ratio"]:
        text += (
            f"  x{row['ratio']:.3f} of {row['peer']} {row['peer_us']:.2f} ±{row['peer_iqr_us']:.2f}"
        )
    return text


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every GPU benchmark takes."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--json", type=Path, help="where to write the result")
    found.add_argument("--rows", help="regular expression on a row's shape")
    found.add_argument(
        "--formats", type=_formats, default=list(FORMATS), help=f"of {','.join(FORMATS)}"
    )
    found.add_argument("--quick", action="store_true", help="the main rows, at page 16 alone")
    found.add_argument("--no-peers", action="store_true", help="fastkv alone")
    found.add_argument(
        "--skip-peers", help="regular expression on the names of peers that are not to be timed"
    )
    found.add_argument(
        "--peer-figures", type=Path, help="take the peers' times from an earlier result"
    )
    found.add_argument("--commit", help="the checkout's, where git is not there to say")
    found.add_argument("--replays", type=int, default=20)
    found.add_argument("--seed", type=int, default=0)
    return found


def start(
    name: str,
    arguments: argparse.Namespace,
    timer: Timer | None = None,
    device: str = "cuda",
    *,
    kernels: Iterable[str],
) -> Report:
    """The report of a run that begins; `kernels` are the CUDA kernels that it times."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{name} needs an NVIDIA GPU that PyTorch sees")
    torch.manual_seed(arguments.seed)
    clock = timer or GraphTimer(arguments.replays)
    report = Report(name, arguments, clock, torch.device(device), tuple(kernels))
    if arguments.peer_figures is not None:
        earlier = json.loads(arguments.peer_figures.read_text("utf-8"))
        report.known = {
            (row["op"], row["format"], row["shape"]): {
                name: Timing(us, 0.0, "earlier") for name, us in row["peers"].items()
            }
            for row in earlier["rows"]
        }
    print(f"{name} on {device_name(report.device)}, {versions()}", flush=True)
    return report


def _formats(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {unknown}; there are {', '.join(FORMATS)}")
    return names


def _relative(argument: str) -> str:
    """A path as seen from the root of the repository: a result names no machine's folders."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def device_name(device: torch.device) -> str:
    """As the driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    found = {"fastkv": fastkv.__version__, "python": platform.python_version()}
    for name, package in (
        ("torch", "torch"),
        ("cupy", "cupy-cuda13x"),
        ("cupy", "cupy-cuda12x"),
        ("triton", "triton"),
        ("flashinfer", "flashinfer-python"),
    ):
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    found["cuda"] = str(torch.version.cuda)
    return {**found, "driver": _driver()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def commit() -> str:
    """Of the checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def about_sources(kernels: Iterable[str]) -> dict[str, Any]:
    """The digest of all kernel sources, and of each kernel that ran.

    These are the kernels that a benchmark says it times, and any other that this process loaded.
    """
    from fastkv.ops.cuda import jit

    ran = {*kernels, *jit.loaded_kernels()}
    return {"digest": jit.source_digest(), "digests": jit.source_digests(ran)}
