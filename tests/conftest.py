# SPDX-License-Identifier: Apache-2.0
"""No test is skipped, except tests in tests/gpu where there is no GPU.

A skip that nobody expects hides a test that no longer runs, so it counts as a failure, and so does
a module skipped at import. Under ``FASTKV_REQUIRE_GPU=1`` nothing is excepted.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path

import hypothesis
import pytest

GPU_TESTS = Path(__file__).resolve().parent / "gpu"

# No deadline: a test never fails because a machine is slow. On CI a failure repeats.
hypothesis.settings.register_profile("fastkv", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("fastkv")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU (set on everything in tests/gpu)")
    config.addinivalue_line("markers", "sanitizer: small enough for scripts/sanitize.py")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.is_relative_to(GPU_TESTS):
        item.add_marker("gpu")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    reason = why_no_gpu()
    if reason:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # An expected failure is also reported as "skipped"; xfail_strict keeps those honest.
    if report.skipped and not hasattr(report, "wasxfail"):
        may_skip = item.get_closest_marker("gpu") is not None and not gpu_required()
        if not may_skip:
            fail_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    # Also in tests/gpu: modules there import without a GPU, their tests need one.
    if report.skipped:
        fail_skip(report)
    return report


def fail_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: a skip counts as a failure here ({reason})"


def gpu_required() -> bool:
    return os.environ.get("FASTKV_REQUIRE_GPU") == "1"


@cache
def why_no_gpu() -> str | None:
    """None where CuPy or PyTorch sees a GPU, else what each of them says."""
    found = []
    # Libraries warn at import, and pytest turns a warning into an exception.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, count in (("cupy", count_with_cupy), ("torch", count_with_torch)):
            try:
                if count() > 0:
                    return None
                found.append(f"{name} sees no device")
            except Exception as error:  # a broken driver raises the library's own exceptions
                found.append(f"{name}: {type(error).__name__}: {error}")
    return f"no GPU: {'; '.join(found)}"


def count_with_cupy() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def count_with_torch() -> int:
    import torch

    return int(torch.cuda.device_count())


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a new interpreter, outside the checkout, and fail when it fails.

    A directory of its own keeps the checkout's fastkv off ``sys.path``, where ``python -c`` puts
    the working directory.
    """
    directory = tmp_path / "run_python"

    def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
        directory.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=directory,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run
