# SPDX-License-Identifier: Apache-2.0
"""Run the GPU suite, none of it skipped, and write what came of it as JSON.

    python scripts/gpu_report.py --json benchmarks/results/gpu_suite.json

Exits with pytest's code. A test compares the digests of the committed report with the sources'.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "cuda-bindings", "torch", "nvidia-cuda-nvrtc")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/gpu_suite.json")
    parser.add_argument("--commit", default=None, help="where the checkout is no git repository")
    parser.add_argument("pytest", nargs="*", help="what pytest runs; unset: tests/gpu")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        chosen = given.pytest or ["tests/gpu"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *chosen, "-q", f"--junitxml={junit}"],
            cwd=ROOT,
            env={**os.environ, "FASTKV_REQUIRE_GPU": "1"},
            check=False,
        )
        counts = counts_of(junit.read_text("utf-8")) if junit.is_file() else None
    if counts is None:
        print("gpu_report: pytest wrote no report", file=sys.stderr)
        return done.returncode or 1
    report = {
        **counts,
        "pytest_exit": done.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "arguments": chosen,
        **about_sources(given.commit),
        **about_versions(),
    }
    given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{report['passed']} passed, {report['skipped']} skipped, {report['failed']} failed")
    return done.returncode


def counts_of(junit: str) -> dict[str, int]:
    """Passed, skipped and failed tests of a junit report, errors counted as failed."""
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ET.fromstring(junit).iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, "0"))
    failed = totals["failures"] + totals["errors"]
    return {
        "passed": totals["tests"] - failed - totals["skipped"],
        "skipped": totals["skipped"],
        "failed": failed,
    }


def about_sources(commit: str | None = None) -> dict[str, Any]:
    """Version, commit, and the digest of all kernel sources and of each kernel."""
    from fastkv import __version__
    from fastkv.ops.cuda import jit

    return {
        "fastkv": __version__,
        "digest": jit.source_digest(),
        "digests": jit.source_digests(),
        "commit": commit or head(),
    }


def head() -> str | None:
    """The commit, with a + where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "HEAD")
    return f"{found}{'+' if git('status', '--porcelain') else ''}" if found else None


def about_versions() -> dict[str, Any]:
    """Device, driver and packages."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"device": device(), "python": platform.python_version(), "versions": versions}


def device() -> dict[str, Any]:
    """Name, capability and driver of device 0, and how many there are."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    return {
        "name": properties["name"].decode(),
        "sm": 10 * properties["major"] + properties["minor"],
        "count": runtime.getDeviceCount(),
        "driver": runtime.driverGetVersion(),
    }


if __name__ == "__main__":
    sys.exit(main())
