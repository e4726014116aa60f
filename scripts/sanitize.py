# SPDX-License-Identifier: Apache-2.0
"""Run compute-sanitizer over the reduced GPU suite; exits with 0 only where it ran and is clean.

Each of memcheck, racecheck, initcheck and synccheck first gets a control: a kernel with the very
fault that the tool is for. A tool that is missing, or reports nothing there, fails. Then the suite
(`pytest tests/gpu -m sanitizer`) must pass under it, with kernels launched and its own summary
saying 0 errors.

    python scripts/sanitize.py --json build/sanitizer.json
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SUITE = (
    sys.executable,
    "-m",
    "pytest",
    "tests/gpu",
    "-m",
    "sanitizer",
    "-q",
    "-p",
    "no:cacheprovider",
)

# Each line of a tool's output that counts, from its own summary. racecheck has one of its own.
_SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", re.MULTILINE
)
_PYTEST = re.compile(r"(\d+) (passed|failed|skipped|error|xfailed|deselected)")

_CONTROL = """
import cupy
cupy.cuda.set_allocator(None)  # a pool would lend the bytes behind an array
kernel = cupy.RawKernel(r'''
extern "C" __global__ void control(volatile int* a, volatile int* b) {{
  __shared__ volatile int shared;
  {body}
}}''', "control")
a, b = cupy.zeros(64, cupy.int32), cupy.empty(64, cupy.int32)
kernel((1,), (64,), (a, b))
cupy.cuda.runtime.deviceSynchronize()
"""
CONTROLS = {
    "memcheck": "a[64 + threadIdx.x] = 1;",
    "racecheck": "shared = threadIdx.x; a[threadIdx.x] = shared;",
    "initcheck": "a[threadIdx.x] = b[threadIdx.x];",
    "synccheck": "if (threadIdx.x < 32) __syncthreads(); a[threadIdx.x] = 1;",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sanitizer", default=None, help="path of compute-sanitizer")
    parser.add_argument("--json", type=Path, default=None, help="where the summary goes")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of one run")
    parser.add_argument("--jobs", type=int, default=1, help="tools that run side by side")
    given = parser.parse_args(arguments)
    sanitizer = find_sanitizer(given.sanitizer)
    if sanitizer is None:
        print(
            "sanitize: compute-sanitizer was not found; it comes with the CUDA toolkit",
            file=sys.stderr,
        )
        return 2
    with ThreadPoolExecutor(given.jobs) as threads:
        ran = threads.map(lambda tool: run_tool(sanitizer, tool, given.timeout), given.tools)
        results = dict(zip(given.tools, ran, strict=True))
    clean = all(not result["faults"] for result in results.values())
    if given.json is not None:
        summary = {"clean": clean, **about(sanitizer), "tools": results}
        given.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for tool, result in results.items():
        verdict = "; ".join(result["faults"]) or "clean"
        print(f"{tool}: {verdict} ({result['tests']} tests, {result['launches']} launches)")
    return 0 if clean else 1


def find_sanitizer(given: str | None) -> str | None:
    """The tool: as given, on the path, or where toolkits are installed."""
    if given is not None:
        return shutil.which(given)
    homes = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        *sorted(glob("/usr/local/cuda*")),
    ]
    beside = [f"{home}/bin/compute-sanitizer" for home in homes if home]
    found = (shutil.which(name) for name in ("compute-sanitizer", *beside))
    return next(filter(None, found), None)


def run_tool(sanitizer: str, tool: str, timeout: float) -> dict[str, Any]:
    """The control, then the suite; `faults` says what is wrong with either."""
    started = time.monotonic()
    control, _ = run(sanitizer, tool, (sys.executable, "-c", control_code(tool)), timeout)
    reported = errors_in(control)
    faults = []
    if not reported:
        said = "nothing" if reported is None else "0 errors"
        faults.append(f"the control is faulty and the tool reported {said}: {tail(control)}")
    output, launches = run(sanitizer, tool, SUITE, timeout)
    counts = {name: int(count) for count, name in _PYTEST.findall(last_line(output))}
    errors, passed = errors_in(output), counts.get("passed", 0)
    if errors is None:
        faults.append(f"the tool printed no summary: {tail(output)}")
    elif errors:
        faults.append(f"{errors} errors: {first_error(output)}")
    if not passed or any(counts.get(name) for name in ("failed", "skipped", "error")):
        faults.append(f"the suite did not pass: {last_line(output)}")
    if not launches:
        faults.append("no kernel was launched under the tool")
    return {
        "faults": faults,
        "control_errors": reported,
        "errors": errors,
        "tests": passed,
        "launches": launches,
        "seconds": round(time.monotonic() - started, 1),
    }


def control_code(tool: str) -> str:
    return _CONTROL.format(body=CONTROLS[tool])


def run(sanitizer: str, tool: str, command: Sequence[str], timeout: float) -> tuple[str, int]:
    """All output of a command under a tool, and how many kernels fastkv launched."""
    with tempfile.TemporaryDirectory() as folder:
        launches = Path(folder) / "launches"
        environment = {
            **os.environ,
            "FASTKV_REQUIRE_GPU": "1",
            "FASTKV_COUNT_LAUNCHES": str(launches),
            # Caching allocators lend the bytes behind a tensor, where an overrun is no error.
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        }
        environment.pop("FASTKV_CHECK", None)
        try:
            done = subprocess.run(
                [sanitizer, "--tool", tool, "--print-limit", "20", *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:g} s", 0
        count = int(launches.read_text()) if launches.is_file() else 0
        return done.stdout, count


def errors_in(output: str) -> int | None:
    """What the tool's own summary counts; None where it printed none."""
    found = [int(errors or hazards) for errors, hazards in _SUMMARY.findall(output)]
    return sum(found) if found else None


def last_line(output: str) -> str:
    """pytest's closing line; the tool's own begin with =."""
    lines = [line for line in output.splitlines() if not line.startswith("=")]
    own = [line for line in lines if _PYTEST.search(line)]
    return own[-1] if own else "no test ran"


def first_error(output: str) -> str:
    lines = [line.lstrip("= ") for line in output.splitlines() if line.startswith("=========")]
    own = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
    return own[0] if own else ""


def tail(output: str) -> str:
    return " | ".join(line.strip() for line in output.splitlines()[-3:] if line.strip())


def about(sanitizer: str) -> dict[str, Any]:
    """Tool, sources, device."""
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_report import about_sources, about_versions

    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    return {
        **about_sources(),
        **about_versions(),
        "sanitizer": " ".join(version.stdout.split()[-4:]),
    }


if __name__ == "__main__":
    sys.exit(main())
