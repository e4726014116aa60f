# SPDX-License-Identifier: Apache-2.0
"""The committed result of mutation testing is good enough, and the documentation explains it."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/mutation.md").read_text(encoding="utf-8")
PARTS = json.loads((ROOT / "benchmarks/results/mutation.json").read_text(encoding="utf-8"))
MUTATED = (
    "fastkv/backends/*.py",
    "fastkv/contracts/*.py",
    "fastkv/quant.py",
    "fastkv/spec.py",
)
# Modules without a mutant: names that are imported, and a class of one line.
BARE = ("__init__.py", "flash_mask.py")
SOURCES = [
    (module, source["sha256"])
    for part in PARTS.values()
    for module, source in part["sources"].items()
]
SURVIVORS = [entry for part in PARTS.values() for entry in part["survivors"]]


def counts():
    """Killed and all mutants of each module and tool; a mutant that hangs is a killed one."""
    found = {}
    for part in PARTS.values():
        for module, tools in part["modules"].items():
            for tool, outcomes in tools.items():
                killed = outcomes.get("killed", 0) + outcomes.get("timeout", 0)
                assert (module, tool) not in found
                found[module, tool] = killed, sum(outcomes.values())
    return found


@pytest.mark.parametrize(("module", "tool"), list(counts()))
def test_nine_of_ten_mutants_are_killed(module, tool):
    killed, every = counts()[module, tool]
    assert killed >= 0.9 * every


def test_every_module_was_mutated():
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fastkv").rglob("*.py")]
    wanted = {
        path
        for path in paths
        if any(fnmatch(path, pattern) for pattern in MUTATED) and Path(path).name not in BARE
    }
    assert {module for module, tool in counts() if tool == "mutmut"} == wanted


@pytest.mark.parametrize(("module", "digest"), SOURCES)
def test_the_result_is_of_the_present_source(module, digest):
    text = (ROOT / module).read_text(encoding="utf-8")
    stale = f"{module} changed: tox -e mutation -- --json FILE PART --module {module}"
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest, stale


def test_every_count_has_its_source():
    for part in PARTS.values():
        assert set(part["sources"]) == set(part["modules"])
        assert all(source["commit"] for source in part["sources"].values())


def test_the_documentation_shows_the_counts():
    for (module, tool), (killed, every) in counts().items():
        assert f"| `{module.removeprefix('fastkv/')}` | {tool} | {every} | {killed} |" in PAGE
    killed, every = (sum(column) for column in zip(*counts().values(), strict=True))
    assert f"| all | | {every} | {killed} |" in PAGE


@pytest.mark.parametrize("entry", SURVIVORS, ids=lambda entry: entry["mutant"])
def test_every_survivor_is_explained(entry):
    assert f"`{function_of(entry)}`" in PAGE


def function_of(entry):
    """`module.Class.method` of a mutant of mutmut's, the operator of one of cosmic-ray's."""
    if entry["tool"] == "cosmic-ray":
        return entry["mutant"].split()[0]
    module, _, name = entry["mutant"].rpartition(".")
    mangled = name.rpartition("__mutmut_")[0].removeprefix("x").lstrip("ǁ")
    plain = mangled.replace("ǁ", ".")
    return f"{module.rpartition('.')[2]}.{plain if '.' in plain else plain.removeprefix('_')}"
