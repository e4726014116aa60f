# SPDX-License-Identifier: Apache-2.0
"""Time of an op's first call in a new process: with an empty cache on disk, and with a full one.

    python benchmarks/bench_startup.py --json benchmarks/results/startup.json

Every figure is of a Python process of its own, which makes the tensors of a small call, has a CUDA
context and has run PyTorch; then it times fastkv's first call up to its synchronization, the import
of CuPy included. "cold" is with an empty CUPY_CACHE_DIR, "disk" with what the cold process left
there. The processes of one case are made ready together and measured one after the other.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

import bench_host
from gpu import report
from gpu.data import FORMATS, Batch, Format, Pool
from gpu.report import Report
from gpu.timing import Timing

COLD, DISK = 1, 3
PAGE = 16
QUICK = ("paged_attention", "rope_write_kv")
# Takes no cache: its kernel is the same for every format, and is measured with the first alone.
WITHOUT_CACHE = "merge_states"
IMPORT, READY = "import cupy", "ready\n"

# What a process says of itself: first_us, second_us, functions.
Sample = Mapping[str, float]
# From a command line, an environment and a number of processes to what each said.
Runner = Callable[[Sequence[str], Mapping[str, str], int], list[Sample]]


def main(
    argv: list[str] | None = None, runner: Runner | None = None, device: str = "cuda"
) -> Report | None:
    """Run from a command line; the other arguments are for tests without a GPU."""
    arguments = parse(argv)
    if arguments.child:
        child(*arguments.child)
        return None
    kernels = ops_of(arguments)
    found = report.start("bench_startup", arguments, None, device, kernels=kernels)
    go = partial(samples, runner or run, found.device)
    imports = found.attempt(IMPORT, partial(import_us, go, found.formats[0]))
    for op, fmt in cases(found):
        with TemporaryDirectory() as folder:
            measure(found, go, op, fmt, Path(folder), imports)
        found.write()
    found.write()
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def cases(found: Report) -> Iterable[tuple[str, Format]]:
    """Every op that has a CUDA kernel in the formats asked; two of both if `--quick`."""
    formats = found.formats[:2] if found.arguments.quick else found.formats
    for fmt in formats:
        for op in ops_of(found.arguments):
            if op != WITHOUT_CACHE or fmt is formats[0]:
                yield op, fmt


def ops_of(arguments: argparse.Namespace) -> Sequence[str]:
    """The ops to measure, each with the kernel of its name."""
    from fastkv.ops.cuda import listing

    return QUICK if arguments.quick else listing.launchers()


def measure(
    found: Report,
    go: Callable[..., list[Sample]],
    op: str,
    fmt: Format,
    folder: Path,
    imports: float | None,
) -> None:
    """One row cold and one from the disk, over a cache folder of their own."""
    before = contents(folder)
    for shape, count in (("cold", COLD), ("disk", DISK)):
        where = f"{op} {fmt.label} {shape}"
        said = found.attempt(where, partial(go, op, fmt, folder, count))
        if said is None:
            return
        after = contents(folder)
        problem = fault(shape, len(after - before), said[0]["functions"])
        if problem:
            found.failed(where, RuntimeError(problem))
            return
        before = after
        if found.wants(shape):
            more = {
                "second_us": median(each["second_us"] for each in said),
                "functions": said[0]["functions"],
                "import_us": imports,
                "samples_us": [each["first_us"] for each in said],
            }
            found.add(op, fmt.label, shape, timing(said), 0, **more)


def fault(shape: str, written: int, functions: float) -> str | None:
    """Why a time is not of what its row says, by the binaries that its processes wrote."""
    if shape == "cold" and functions and not written:
        return "no binary was left in the cache"
    if shape == "disk" and written:
        return f"compiled anew: {written} binaries more in the cache"
    return None


def timing(said: Sequence[Sample]) -> Timing:
    """Median of the first calls, and their range in place of quartiles."""
    first = [each["first_us"] for each in said]
    return Timing(median(first), max(first) - min(first), "first call")


def import_us(go: Callable[..., list[Sample]], fmt: Format) -> float:
    """What the import of CuPy takes of every first call.

    A call that does not count comes before it: it reads the libraries' files from the disk.
    """
    with TemporaryDirectory() as folder:
        go(QUICK[0], fmt, Path(folder), 1)
        return timing(go(IMPORT, fmt, Path(folder), DISK)).us


def contents(folder: Path) -> set[tuple[str, int]]:
    """The cached binaries, and when each was written."""
    files = (path for path in (folder / "cupy").rglob("*") if path.is_file())
    return {(path.name, path.stat().st_mtime_ns) for path in files}


def samples(
    runner: Runner, device: torch.device, op: str, fmt: Format, folder: Path, count: int
) -> list[Sample]:
    """What `count` new processes say, all over one cache folder."""
    command = [sys.executable, str(Path(__file__)), "--child", op, fmt.label, device.type]
    # The driver's own cache too: a kernel that it translates would else never be cold.
    caches = {"CUPY_CACHE_DIR": folder / "cupy", "CUDA_CACHE_PATH": folder / "driver"}
    return runner(command, {name: str(path) for name, path in caches.items()}, count)


def run(command: Sequence[str], environment: Mapping[str, str], count: int) -> list[Sample]:
    """Start all processes, wait until each is ready, then let them measure one by one."""
    pipe = subprocess.PIPE
    # Beside this file lie modules that it imports; PYTHONSAFEPATH leaves its folder out.
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    paths = {"PYTHONPATH": os.pathsep.join(folders)}
    begin = partial(
        subprocess.Popen[str], command, env={**os.environ, **paths, **environment}, text=True
    )
    started = [begin(stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None, "it is a pipe"
            while process.stdout.readline() not in (READY, ""):
                pass
        return [finish(process) for process in started]
    finally:
        for process in started:
            process.kill()  # nothing, where it has ended
            process.communicate()


def finish(process: "subprocess.Popen[str]") -> Sample:
    """Let a process that is ready measure; what it says on its last line."""
    said, problem = process.communicate("go\n")
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {problem[-250:]}")
    sample: Sample = json.loads(said.strip().rpartition("\n")[2])
    return sample


def child(op: str, label: str, device: str) -> None:
    """The process that is measured."""
    call = prepared(op, FORMATS[label], torch.device(device))
    print(READY, end="", flush=True)
    sys.stdin.readline()
    first, second = (once(call, device) for _ in range(2))
    from fastkv.ops.cuda import jit  # after the first call, whose import it is

    said = {"first_us": first, "second_us": second, "functions": jit.loaded()}
    print(json.dumps(said), flush=True)


def prepared(op: str, fmt: Format, device: torch.device) -> Callable[[], Any]:
    """The call, all of its tensors made, after work of PyTorch's on the same device."""
    tokens = bench_host.REQUESTS * bench_host.CONTEXT
    pool = Pool.random(fmt, bench_host.HKV, bench_host.D, tokens, 1, device)
    batch = Batch.make(bench_host.REQUESTS, 1, bench_host.CONTEXT, PAGE, device)
    calls = dict(bench_host.calls(pool, batch, device))
    calls[IMPORT] = partial(import_module, "cupy")
    torch.ones(1, device=device).add_(1)
    synchronize(device.type)
    return calls[op]


def once(call: Callable[[], Any], device: str) -> float:
    """Microseconds from the call to the end of its work."""
    start = perf_counter()
    call()
    synchronize(device)
    return (perf_counter() - start) * 1e6


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
