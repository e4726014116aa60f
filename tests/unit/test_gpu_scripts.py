# SPDX-License-Identifier: Apache-2.0
"""The scripts around the GPU suite: none passes where something did not run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import kernel_sources
from fastkv.ops.cuda import jit

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@pytest.fixture
def script(monkeypatch):
    """Loads a script as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    monkeypatch.setattr(sys, "path", list(sys.path))
    return load


# --- scripts/sanitize.py ----------------------------------------------------------------------

# Stands in for compute-sanitizer: prints what the test wants for the control and for the suite.
FAKE = """#!{python}
import json, os, sys
said = json.load(open({answers!r}))
tool = sys.argv[sys.argv.index("--tool") + 1]
which = "suite" if "pytest" in sys.argv else "control"
open({log!r}, "a").write(f"{{tool}} {{which}}\\n")
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
assert os.environ["FASTKV_REQUIRE_GPU"] == "1"
print(said[which].get(tool, said[which]["any"]))
if which == "suite" and said["launches"] is not None:
    open(os.environ["FASTKV_COUNT_LAUNCHES"], "w").write(str(said["launches"]))
"""
RACES = "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)"
ERRORS = "========= ERROR SUMMARY: {0} errors"
PASSED = "55 passed, 300 deselected in 9.1s"


def answers(**changes):
    good = {
        "control": {"any": ERRORS.format(64), "racecheck": RACES.format(2)},
        "suite": {
            "any": f"========= COMPUTE-SANITIZER\n{PASSED}\n{ERRORS.format(0)}",
            "racecheck": f"{PASSED}\n{RACES.format(0)}",
        },
        "launches": 400,
    }
    return good | changes


@pytest.fixture
def sanitize(script, tmp_path, monkeypatch):
    """Runs the script over a stand-in tool; gives exit code, summary and the tool's runs."""
    module = script("sanitize")
    monkeypatch.setattr(module, "about", lambda _: {"digest": "0"})

    def run(said, *options):
        given, log, tool = (tmp_path / name for name in ("answers", "log", "tool"))
        given.write_text(json.dumps(said))
        tool.write_text(FAKE.format(python=sys.executable, answers=str(given), log=str(log)))
        tool.chmod(0o755)
        summary = tmp_path / "summary.json"
        code = module.main(["--sanitizer", str(tool), "--json", str(summary), *options])
        return code, json.loads(summary.read_text()), log.read_text().splitlines()

    return run


def test_clean_runs_pass(sanitize):
    code, summary, ran = sanitize(answers())
    assert code == 0
    assert summary["clean"] is True
    assert ran == [f"{tool} {which}" for tool in TOOLS for which in ("control", "suite")]
    for tool in TOOLS:
        result = summary["tools"][tool]
        assert (result["tests"], result["errors"], result["launches"]) == (55, 0, 400)
        assert result["control_errors"] == (2 if tool == "racecheck" else 64)


def test_tools_run_side_by_side(sanitize):
    code, summary, ran = sanitize(answers(), "--jobs", "4")
    assert (code, list(summary["tools"])) == (0, list(TOOLS))
    assert sorted(ran) == sorted(
        f"{tool} {which}" for tool in TOOLS for which in ("control", "suite")
    )


NOT_CLEAN = {
    "a blind tool": (
        {"control": {"any": ERRORS.format(0), "racecheck": RACES.format(0)}},
        "the control is faulty and the tool reported 0 errors",
    ),
    "a tool that did not run": (
        {"control": {"any": "command not found"}},
        "the tool reported nothing",
    ),
    "errors": (
        {"suite": {"any": f"========= Invalid __global__ write\n{PASSED}\n{ERRORS.format(3)}"}},
        "3 errors: Invalid __global__ write",
    ),
    "no summary": ({"suite": {"any": PASSED}}, "the tool printed no summary"),
    "a failed test": (
        {"suite": {"any": f"1 failed, 54 passed in 9s\n{ERRORS.format(0)}"}},
        "the suite did not pass: 1 failed, 54 passed",
    ),
    "a skipped test": (
        {"suite": {"any": f"54 passed, 1 skipped in 9s\n{ERRORS.format(0)}"}},
        "the suite did not pass",
    ),
    "no test": (
        {"suite": {"any": f"355 deselected in 9s\n{ERRORS.format(0)}"}},
        "the suite did not pass: 355 deselected",
    ),
    "no pytest": ({"suite": {"any": ERRORS.format(0)}}, "no test ran"),
    "no launch": ({"launches": 0}, "no kernel was launched"),
    "no count": ({"launches": None}, "no kernel was launched"),
}


@pytest.mark.parametrize(("changes", "fault"), NOT_CLEAN.values(), ids=NOT_CLEAN)
def test_what_did_not_run_or_is_not_clean_fails(sanitize, changes, fault, capsys):
    code, summary, _ = sanitize(answers(**changes))
    assert code == 1
    assert summary["clean"] is False
    for tool in TOOLS:
        assert any(fault in said for said in summary["tools"][tool]["faults"]), tool
    assert fault in capsys.readouterr().out


def test_a_missing_tool_is_no_pass(script, monkeypatch, capsys):
    module = script("sanitize")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(module, "glob", lambda _: [])
    assert module.main([]) == 2
    assert "compute-sanitizer was not found" in capsys.readouterr().err


def test_every_tool_has_a_control_that_is_code(script):
    module = script("sanitize")
    assert set(module.CONTROLS) == set(module.TOOLS) == set(TOOLS)
    for tool in TOOLS:
        compile(module.control_code(tool), tool, "exec")
        assert module.CONTROLS[tool] in module.control_code(tool)


# --- scripts/gpu_report.py --------------------------------------------------------------------

SUITE = (
    "import pytest\n"
    "def test_passes(): pass\n"
    "def test_fails(): assert 0\n"
    "@pytest.fixture\ndef broken(): raise ValueError\n"
    "def test_error(broken): pass\n"
    "def test_skips(): pytest.skip('why')\n"
    "def test_required():\n    import os\n    assert os.environ['FASTKV_REQUIRE_GPU'] == '1'\n"
)


def test_the_report_counts(script, tmp_path, monkeypatch, capfd):
    module = script("gpu_report")
    monkeypatch.setattr(module, "device", lambda: {"name": "a GPU", "sm": 90})
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    (tmp_path / "test_it.py").write_text(SUITE)
    written = tmp_path / "report.json"
    assert module.main(["--json", str(written), "--commit", "abc", "test_it.py"]) == 1
    report = json.loads(written.read_text())
    assert (report["passed"], report["skipped"], report["failed"]) == (2, 1, 2)
    assert (report["digest"], report["commit"]) == (jit.source_digest(), "abc")
    assert report["digests"] == {name: jit.source_digest(name) for name in jit.kernels()}
    assert report["device"] == {"name": "a GPU", "sm": 90}
    assert report["versions"]["numpy"]
    assert "2 passed, 1 skipped, 2 failed" in capfd.readouterr().out


def test_no_report_without_pytest(script, tmp_path, monkeypatch, capfd):
    module = script("gpu_report")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    written = tmp_path / "report.json"
    assert module.main(["--json", str(written), "nothing.py"]) == 1
    assert not written.exists()
    assert "pytest wrote no report" in capfd.readouterr().err


# --- the committed report ---------------------------------------------------------------------

REPORT = ROOT / "benchmarks" / "results" / "gpu_suite.json"
CLAIM = ROOT / "docs" / "development.md"


def claim():
    """The documentation's statement of the suite's run, between its marks; empty if it has none."""
    text = CLAIM.read_text("utf-8")
    begin, end = "<!-- gpu suite -->", "<!-- /gpu suite -->"
    assert text.count(begin) == text.count(end) == 1
    return text.partition(begin)[2].partition(end)[0].strip()


def statement(report, kernels):
    """What the documentation says of a report, where there are these kernels."""
    device = report["device"]
    unseen = ", ".join(f"`{name}`" for name in kernels if name not in report["digests"])
    return (
        f"The committed report, `benchmarks/results/gpu_suite.json`: {report['passed']} passed, "
        f"{report['skipped']} skipped,\n{report['failed']} failed on one {device['name']}. "
        f"Kernel sources:\n{kernel_sources.listed([report])}."
    ) + (f"\nThese kernels are newer and not in it: {unseen}." if unseen else "")


def test_the_documentation_says_what_the_report_says():
    if not REPORT.exists():
        assert claim() == "No report of the GPU suite is committed."
        return
    report = json.loads(REPORT.read_text("utf-8"))
    assert claim() == statement(report, jit.kernels())
    stale = kernel_sources.stale(REPORT.name, report, jit.source_digests())
    assert stale == [], "the kernels changed since: run it again"
    assert (report["failed"], report["skipped"], report["pytest_exit"]) == (0, 0, 0)
    assert report["arguments"] == ["tests/gpu"]
    assert report["passed"] >= 300


def test_a_kernel_that_the_report_has_not_is_named():
    report = json.loads(REPORT.read_text("utf-8"))
    del report["digests"]["copy_pages"]
    said = statement(report, ["copy_pages", "gather_kv", "later"])
    assert said.endswith("\nThese kernels are newer and not in it: `copy_pages`, `later`.")
    assert "`gather_kv` `" in said


# --- scripts/kernel_sources.py ----------------------------------------------------------------

PRESENT = {"gather_kv": "a" * 16, "copy_pages": "b" * 16}


def stale(digests, ops=()):
    result = {"digests": digests, "rows": [{"op": op} for op in ops]}
    return kernel_sources.stale("x.json", result, PRESENT)


def test_a_result_of_present_kernels_is_not_stale_whatever_else_there_is():
    assert stale({"gather_kv": "a" * 16}, ["gather_kv", "an op without a kernel"]) == []
    assert stale(PRESENT) == []


@pytest.mark.parametrize(
    ("digests", "ops", "said"),
    [
        ({"gather_kv": "c" * 16}, (), f"measured on gather_kv {'c' * 16}, not {'a' * 16}"),
        ({"gather_kv": "b" * 16}, (), f"measured on gather_kv {'b' * 16}, not {'a' * 16}"),
        ({"old": "c" * 16}, (), f"measured on old {'c' * 16}, not there any more"),
        ({"gather_kv": "a" * 16}, ["copy_pages"], "has no digest of copy_pages"),
        ({}, ["gather_kv"], "has no digest of any kernel"),
        ({}, (), "has no digest of any kernel"),
    ],
)
def test_a_result_of_other_kernels_is_stale(digests, ops, said):
    assert f"x.json: {said}" in stale(digests, ops)


def test_a_result_of_before_there_were_digests_of_kernels_is_stale():
    assert kernel_sources.stale("x.json", {"digest": "a" * 16}, PRESENT) == [
        "x.json: has no digest of any kernel"
    ]


def test_kernels_are_listed_once_unless_results_differ():
    two = [{"digests": PRESENT}, {"digests": {"gather_kv": "a" * 16}}]
    once = f"`copy_pages` `{'b' * 16}`, `gather_kv` `{'a' * 16}`"
    assert kernel_sources.listed(two) == once
    two[1]["digests"]["gather_kv"] = "c" * 16
    assert kernel_sources.listed(two) == f"{once}, `gather_kv` `{'c' * 16}`"
