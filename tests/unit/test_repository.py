# SPDX-License-Identifier: Apache-2.0
"""Facts that several files of the repository state must agree; a skip must fail."""

import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TEST_COMMAND = "pip install tox && tox"
EXTRAS = {
    "cuda12",
    "cuda13",
    "eval",
    "paddle",
    "paddle-gpu",
    "plot",
    "torch",
    "transfer",
    "transformers",
}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def tox_ini() -> ConfigParser:
    config = ConfigParser(interpolation=None)
    config.read_string(read("tox.ini"))
    return config


def pins(environment: str) -> dict[str, str]:
    """What a tox environment pins with ``==``."""
    lines = tox_ini()[f"testenv:{environment}"]["deps"].splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


# Commands and versions that are written down twice


def test_readme_and_ci_run_the_same_test_command():
    for path in ("README.md", ".ci/run"):
        assert TEST_COMMAND in [line.strip() for line in read(path).splitlines()], path


def test_ci_runs_every_further_environment_that_needs_no_gpu():
    chains = re.findall(r"^chain \w+ (\S+) &$", read(".ci/run"), re.MULTILINE)
    wanted = {
        "torch",
        "paddle",
        "transformers",
        "eval",
        "docs",
        "cuda-compile",
        "coverage",
        "transfer",
    }
    assert sorted(",".join(chains).split(",")) == sorted(wanted)


def test_ci_script_is_executable():
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_plain_tox_runs_unit_lint_types():
    assert tox_ini()["tox"]["env_list"] == "unit, lint, types"


def test_coverage_and_mutation_rest_on_the_same_tests():
    pattern = r"tests/unit/\S+?\.py(?![\w:])"
    listed = re.findall(pattern, tox_ini()["testenv:coverage"]["commands"])
    assert sorted(set(re.findall(pattern, read("scripts/mutation.py")))) == listed


def test_lowest_environment_pins_the_lower_bounds():
    bounds = dict(line.split(">=") for line in project()["dependencies"])
    lowest = pins("lowest")
    assert {name: lowest.get(name) for name in bounds} == bounds


def test_pre_commit_and_tox_use_the_same_ruff():
    hooks = read(".pre-commit-config.yaml").split("ruff-pre-commit")[1]
    rev = re.search(r"rev: v(\S+)", hooks)[1]
    assert pins("lint") == {"ruff": rev}


def test_every_extra_is_documented():
    assert set(project()["optional-dependencies"]) == EXTRAS
    documented = set(re.findall(r"^\| `([\w-]+)` \|", read("docs/development.md"), re.MULTILINE))
    assert documented >= EXTRAS


def test_changelog_has_a_section_for_what_is_not_released():
    assert read("CHANGELOG.md").count("\n## [Unreleased]\n") == 1


def test_every_page_of_the_documentation_is_in_the_navigation():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r"^\s+- [^:]+: (\S+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    assert pages == listed


# Licence and style that ruff does not check


def sources() -> list[Path]:
    folders = ("fastkv", "tests", "scripts", "benchmarks")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert Path(__file__).resolve() in found
    return sorted(found)


def test_every_python_source_opens_with_its_licence():
    header = "# SPDX-License-Identifier: Apache-2.0"
    without = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.read_text(encoding="utf-8").split("\n")[0] != header
    ]
    assert without == []


# The hook of tests/conftest.py that makes a skip fail

GPU_LIBRARIES = {
    "cupy": "class cuda:\n class runtime:\n  getDeviceCount = staticmethod(lambda: {count})",
    "torch": "class cuda:\n device_count = staticmethod(lambda: 0)",
}
SKIPS = {
    "call": "import pytest\ndef test_it():\n    pytest.skip('why')",
    "mark": "import pytest\n@pytest.mark.skip(reason='why')\ndef test_it():\n    pass",
    "fixture": (
        "import pytest\n@pytest.fixture\ndef broken():\n    pytest.skip('why')\n"
        "def test_it(broken):\n    pass"
    ),
}
MODULE_SKIPS = {
    "module": "import pytest\npytest.skip('why', allow_module_level=True)",
    "importorskip": "import pytest\npytest.importorskip('no_such_module', reason='why')",
}


@pytest.fixture
def run_pytest(pytester, monkeypatch):
    """Run one test module under a copy of tests/conftest.py, in a process of its own."""

    def run(folder, code, *, gpus=0, require_gpu=None):
        for name, source in GPU_LIBRARIES.items():
            (pytester.mkdir(f"fake_{name}") / f"{name}.py").write_text(source.format(count=gpus))
        fakes = os.pathsep.join(str(pytester.path / f"fake_{name}") for name in GPU_LIBRARIES)
        monkeypatch.setenv("PYTHONPATH", fakes)
        monkeypatch.delenv("FASTKV_REQUIRE_GPU", raising=False)
        if require_gpu:
            monkeypatch.setenv("FASTKV_REQUIRE_GPU", require_gpu)
        module = pytester.path / "tests" / folder / "test_it.py"
        module.parent.mkdir(parents=True)
        module.write_text(code)
        (pytester.path / "tests" / "conftest.py").write_text(read("tests/conftest.py"))
        return pytester.runpytest_subprocess("-ra", "-p", "no:cacheprovider", "tests")

    return run


@pytest.mark.parametrize("code", SKIPS.values(), ids=SKIPS)
def test_skip_fails(run_pytest, code):
    result = run_pytest("unit", code)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*a skip counts as a failure here*why*"])
    assert "skipped" not in result.parseoutcomes()


@pytest.mark.parametrize("folder", ["unit", "gpu"])
@pytest.mark.parametrize("code", MODULE_SKIPS.values(), ids=MODULE_SKIPS)
def test_skip_of_a_module_fails(run_pytest, folder, code):
    result = run_pytest(folder, code)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert result.parseoutcomes() == {"errors": 1}
    result.stdout.fnmatch_lines(["*a skip counts as a failure here*why*"])


def test_expected_failure_is_no_skip(run_pytest):
    code = "import pytest\n@pytest.mark.xfail\ndef test_it():\n    raise ValueError"
    assert run_pytest("unit", code).parseoutcomes() == {"xfailed": 1}


PASSES = "def test_it():\n    pass"


@pytest.mark.parametrize(
    ("gpus", "require_gpu", "outcomes"),
    [
        (0, None, {"skipped": 1}),
        (0, "0", {"skipped": 1}),
        (0, "1", {"errors": 1}),  # fails in setup, which pytest calls an error
        (1, None, {"passed": 1}),
        (1, "1", {"passed": 1}),
    ],
)
def test_gpu_test_needs_a_gpu(run_pytest, gpus, require_gpu, outcomes):
    result = run_pytest("gpu", PASSES, gpus=gpus, require_gpu=require_gpu)
    assert result.parseoutcomes() == outcomes


def test_gpu_test_may_not_skip_where_a_gpu_is_required(run_pytest):
    result = run_pytest("gpu", SKIPS["call"], gpus=1, require_gpu="1")
    assert result.parseoutcomes() == {"failed": 1}


def test_gpu_required_changes_nothing_for_other_tests(run_pytest):
    assert run_pytest("unit", PASSES, require_gpu="1").parseoutcomes() == {"passed": 1}


# The project's own pytest configuration


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import warnings\ndef test_it():\n    warnings.warn('text', UserWarning)", "*: text*"),
        ("import pytest\n@pytest.mark.xfail\ndef test_it():\n    pass", "*XPASS(strict)*"),
        ("import pytest\n@pytest.mark.gpuu\ndef test_it():\n    pass", "*'gpuu' not found*"),
    ],
    ids=["warning", "unexpected pass", "misspelt marker"],
)
def test_configuration_is_strict(pytester, code, says):
    module = pytester.makepyfile(code)
    result = pytester.runpytest_subprocess("-c", ROOT / "pyproject.toml", module)
    assert result.ret != pytest.ExitCode.OK
    result.stdout.fnmatch_lines([says])
