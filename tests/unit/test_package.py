# SPDX-License-Identifier: Apache-2.0
"""What the wheel contains, and that these tests run on it."""

import json
import os
import sysconfig
from importlib.metadata import distribution, entry_points, version
from importlib.resources import files
from pathlib import Path, PurePosixPath

import fastkv

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(fastkv.__file__).resolve().parent


def is_editable() -> bool:
    origin = json.loads(distribution("fastkv").read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable", False))


def test_tests_run_on_the_installed_package():
    # tox sets the variable and installs a wheel; only a developer's own environment may do without.
    if os.environ.get("FASTKV_TEST_INSTALLED") == "1" or not is_editable():
        want = Path(sysconfig.get_path("purelib")).resolve() / "fastkv"
    else:
        want = ROOT / "fastkv"
    assert want == PACKAGE


def test_subprocesses_of_tests_import_the_same_package(run_python):
    done = run_python("import fastkv; print(fastkv.__file__)")
    assert Path(done.stdout.strip()).resolve() == Path(fastkv.__file__).resolve()


def test_version_is_the_one_of_the_metadata():
    assert fastkv.__version__ == version("fastkv")


def test_package_is_marked_as_typed():
    assert files("fastkv").joinpath("py.typed").is_file()


def test_sample_is_a_safetensors_file_with_tensors():
    sample = files("fastkv").joinpath("data", "smollm2_sample.safetensors").read_bytes()
    length = int.from_bytes(sample[:8], "little")
    header = json.loads(sample[8 : 8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert 8 + length + max(ends) == len(sample)
    assert len(sample) <= 3 * 1024 * 1024


def test_every_file_of_the_package_is_installed():
    source = ROOT / "fastkv"
    want = {
        PurePosixPath(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".pyo"}
    }
    missing = sorted(str(path) for path in want if not (PACKAGE / path).is_file())
    assert want
    assert missing == []


def test_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="fastkv")
    assert command.value == "fastkv.cli:main"
    assert callable(command.load())
