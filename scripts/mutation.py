# SPDX-License-Identifier: Apache-2.0
"""Mutation testing of the policies, the spec, the formats and the contracts.

Works on copies of the checkout, which itself is never mutated. mutmut mutates what is inside
functions, each mutant against those tests of its group that reach the function; cosmic-ray mutates
`quant.py`, a table, of which mutmut sees little. See docs/mutation.md.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fastkv", "tests", "docs", "README.md", "pyproject.toml")
# No test leaves an exception behind in a destructor or thread; looking for one is a third of a run.
PYTEST = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"]

REMEMBERED = "tests/unit/ops/test_contracts_remembered.py"
TEXTS = ["tests/unit/backends/test_policy_error_texts.py"]
SPEC = [
    *TEXTS,
    "tests/unit/test_quant.py",
    "tests/unit/test_spec.py",
    # It reads the sources, which in the copy hold the mutants.
    "--deselect=tests/unit/test_quant.py::test_no_source_compares_with_the_name_of_a_format",
]
BACKENDS = [
    *TEXTS,
    "tests/unit/backends/test_backend_before_writing.py",
    "tests/unit/backends/test_backend_calls.py",
    "tests/unit/backends/test_backend_lacks.py",
    "tests/unit/backends/test_backend_options.py",
    "tests/unit/backends/test_backend_required.py",
    "tests/unit/backends/test_backend_resolve.py",
    "tests/unit/backends/test_backend_select.py",
    "tests/unit/test_docs_tables.py",
]
BACKENDS_FIRST = [
    *TEXTS,
    "tests/unit/backends/test_backend_lacks.py",
    "tests/unit/backends/test_backend_options.py",
    BACKENDS[-1],
]
CONTRACTS = [
    "tests/unit/backends/test_backend_before_writing.py",
    REMEMBERED,
    "tests/unit/ops/test_op_contracts.py",
    "tests/unit/ops/test_op_error_texts.py",
    "tests/unit/ops/test_presence_texts.py",
    "tests/unit/scales/test_scales_bundle.py",
    f"--deselect={REMEMBERED}::test_the_contracts_of_ops_are_remembered",
]
CONTRACTS_FIRST = [CONTRACTS[1], *CONTRACTS[3:5], CONTRACTS[-1]]
# Modules, and the tests that answer for them: few that are fast, then all for what these let live.
# Attention end to end is not among them: it is slow, and would hide that a unit test is missing.
GROUPS = {
    "spec": (["fastkv/quant.py", "fastkv/spec.py"], SPEC, SPEC),
    "backends": (["fastkv/backends/*.py"], BACKENDS_FIRST, BACKENDS),
    "contracts": (["fastkv/contracts/*.py"], CONTRACTS_FIRST, CONTRACTS),
}
TABLES = {"fastkv/quant.py": SPEC}
PARTS = (*GROUPS, "tables")


def copy_checkout(target: Path) -> None:
    target.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy(source, target / name)


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        env=os.environ | {"CI": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


# mutmut


def undecorate(directory: Path) -> None:
    """mutmut leaves decorated functions alone; this decorator does nothing for CPU tensors."""
    contracts = directory / "fastkv/contracts/calls.py"
    text = contracts.read_text(encoding="utf-8")
    contracts.write_text(text.replace("\n@remembered\n", "\n"), encoding="utf-8")


def run_mutmut(
    folder: Path, modules: list[str], first: list[str], tests: list[str]
) -> list[dict[str, str]]:
    outcomes = mutmut_pass(folder / "first", modules, first)
    lived = [name for name, outcome in outcomes.items() if outcome not in ("killed", "timeout")]
    directory = folder / "all"
    if lived and tests is not first:
        again = mutmut_pass(directory, modules, tests, *lived)
        outcomes |= {name: again[name] for name in lived}
    else:
        directory = folder / "first"
    return [
        {"tool": "mutmut", "module": module_of(name), "mutant": name, "outcome": outcome}
        | ({} if outcome in ("killed", "timeout") else shown(directory, name))
        for name, outcome in outcomes.items()
    ]


def mutmut_pass(
    directory: Path, modules: list[str], tests: list[str], *names: str
) -> dict[str, str]:
    """The outcome of each mutant, or of those named, under some tests."""
    copy_checkout(directory)
    undecorate(directory)
    config = {
        "source_paths": ["fastkv"],
        "only_mutate": modules,
        "also_copy": ["README.md", "docs"],
        "pytest_add_cli_args": PYTEST,
        "pytest_add_cli_args_test_selection": tests,
    }
    with (directory / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n")
        file.writelines(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
    run("mutmut", "run", "--max-children", "1", *names, cwd=directory)
    lines = run("mutmut", "results", "--all", "true", cwd=directory).splitlines()
    pairs = [line.strip().rpartition(": ") for line in lines if ": " in line]
    return {name: outcome for name, _, outcome in pairs}


def module_of(name: str) -> str:
    return name.rpartition(".")[0].replace(".", "/") + ".py"


def shown(directory: Path, name: str) -> dict[str, str]:
    diff = run("mutmut", "show", name, cwd=directory).splitlines()
    return changed_lines(diff)


def changed_lines(diff: list[str]) -> dict[str, str]:
    lines = [line for line in diff if not line.startswith(("---", "+++"))]
    old = " ".join(line[1:].strip() for line in lines if line.startswith("-"))
    new = " ".join(line[1:].strip() for line in lines if line.startswith("+"))
    return {"old": old, "new": new}


# cosmic-ray


def run_cosmic_ray(directory: Path, module: str, tests: list[str]) -> list[dict[str, str]]:
    name = Path(module).stem
    command = [sys.executable, "-m", "pytest", "-x", "-q", *PYTEST, *tests]
    config, session = f"{name}.toml", f"{name}.sqlite"
    (directory / config).write_text(
        "[cosmic-ray]\n"
        f'module-path = "{module}"\n'
        "timeout = 120.0\n"
        "excluded-modules = []\n"
        f"test-command = {json.dumps(' '.join(command))}\n"
        '[cosmic-ray.distributor]\nname = "local"\n',
        encoding="utf-8",
    )
    first = {"PYTHONPATH": str(directory)}  # in front of an installed fastkv
    run("cosmic_ray.cli", "init", config, session, cwd=directory, env=first)
    run("cosmic_ray.cli", "baseline", config, cwd=directory, env=first)
    run("cosmic_ray.cli", "exec", config, session, cwd=directory, env=first)
    dump = run("cosmic_ray.cli", "dump", session, cwd=directory)
    return [cosmic_ray_outcome(module, *json.loads(line)) for line in dump.splitlines()]


def cosmic_ray_outcome(module: str, item: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    (mutation,) = item["mutations"]
    operator = mutation["operator_name"].removeprefix("core/")
    entry = {
        "tool": "cosmic-ray",
        "module": module,
        "mutant": f"{operator} {mutation['occurrence']}",
        "outcome": result["test_outcome"],
    }
    if entry["outcome"] == "killed":
        return entry
    return entry | changed_lines((result["diff"] or "").splitlines())


# The result


def checked_out() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def digest(module: str) -> str:
    """What tells a source from one that was changed since; the same for any ends of lines."""
    text = (ROOT / module).read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def report(mutants: list[dict[str, str]], seconds: float) -> dict[str, Any]:
    counts = Counter((m["module"], m["tool"], m["outcome"]) for m in mutants)
    modules: dict[str, dict[str, dict[str, int]]] = {}
    for (module, tool, outcome), count in sorted(counts.items()):
        modules.setdefault(module, {}).setdefault(tool, {})[outcome] = count
    return {
        "python": sys.version.split()[0],
        "tools": {tool: version(tool) for tool in ("mutmut", "cosmic-ray", "pytest")},
        "minutes": round(seconds / 60),
        "modules": modules,
        "survivors": [m for m in mutants if m["outcome"] not in ("killed", "timeout")],
    }


def patterns(part: str) -> list[str]:
    return [*TABLES] if part == "tables" else GROUPS[part][0]


def sources(wanted: Iterable[str]) -> dict[str, dict[str, str]]:
    """The commit and the digest of each module that is about to be mutated."""
    paths = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fastkv").rglob("*.py")]
    found = sorted(path for path in paths if any(fnmatch(path, each) for each in wanted))
    commit = checked_out()
    return {path: {"commit": commit, "sha256": digest(path)} for path in found}


def run_part(part: str, only: list[str]) -> dict[str, Any]:
    measured, began, mutants = sources(only or patterns(part)), time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        if part == "tables":
            directory = Path(folder) / part
            copy_checkout(directory)
            for module in measured:
                mutants += run_cosmic_ray(directory, module, TABLES[module])
        else:
            mutants += run_mutmut(Path(folder), list(measured), *GROUPS[part][1:])
    result = report(mutants, time.monotonic() - began)
    # A module without a function has no mutant, so nothing that could go stale.
    used = {name: source for name, source in measured.items() if name in result["modules"]}
    return {"sources": used} | result


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A part of which some modules were measured again; the others keep what they have."""
    kept = [entry for entry in old["survivors"] if entry["module"] not in new["sources"]]
    return new | {
        "sources": dict(sorted((old["sources"] | new["sources"]).items())),
        "modules": dict(sorted((old["modules"] | new["modules"]).items())),
        "minutes": old["minutes"],
        "survivors": sorted(kept + new["survivors"], key=lambda entry: entry["module"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="counts and survivors go there")
    parser.add_argument("--module", action="append", default=[], help="only this one of a part")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; the others stay")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part: {', '.join(sorted(unknown))}")
    if arguments.module and len(arguments.parts) != 1:
        parser.error("--module wants the one part that the module is of")
    for part in arguments.parts:
        if foreign := set(arguments.module) - set(sources(patterns(part))):
            parser.error(f"not in {part}: {', '.join(sorted(foreign))}")
    target = arguments.json
    document = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    for part in arguments.parts or PARTS:
        result = run_part(part, arguments.module)
        document[part] = merged(document[part], result) if arguments.module else result
        text = json.dumps(document, indent=1, ensure_ascii=False)
        target.write_text(text + "\n", encoding="utf-8")
        print(part, json.dumps(document[part]["modules"]), flush=True)


if __name__ == "__main__":
    main()
