# SPDX-License-Identifier: Apache-2.0
"""Policy is pure Python: proved in new interpreters, and in the source."""

import ast
import re
from pathlib import Path

import pytest

import fastkv
from fastkv import QuantType

PACKAGE = Path(fastkv.__file__).resolve().parent
TESTS = Path(__file__).resolve().parents[2]
HEAVY = ("numpy", "ml_dtypes", "cupy", "torch", "paddle", "typer", "rich", "matplotlib")
ARRAYS = {"numpy", "ml_dtypes", "cupy", "torch", "paddle", "safetensors", "cuda"}
#: What must not import an array library at module level, files and folders.
PURE = (
    "__init__.py",
    "backends",
    "batch.py",
    "cache.py",
    "contracts",
    "dtypes.py",
    "errors.py",
    "quant.py",
    "rope.py",
    "spec.py",
)
#: Where formats are spelled out: their table, and the codecs.
SPELLED_OUT = {"quant.py", "ops/reference/codecs.py"}

LOADED = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules])"


def sources(*places):
    paths = [PACKAGE / place for place in places or (".",)]
    return [file for path in paths for file in (sorted(path.rglob("*.py")) or [path])]


# --- in a new interpreter ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "fastkv",
        "fastkv.backends",
        "fastkv.spec",
        "fastkv.quant",
        "fastkv.batch",
        "fastkv.cache",
        "fastkv.scales",
        "fastkv.contracts.presence",
    ],
)
def test_importing_loads_no_array_library(module, run_python):
    assert run_python(f"import {module}; {LOADED}").stdout.strip() == "[]"


def test_the_probe_finds_an_array_library(run_python):
    # fastkv.ops may import NumPy when it runs; here it is asked to.
    code = f"from fastkv import Rope; Rope.from_theta(1e4, 8, 2); {LOADED}"
    assert "numpy" in run_python(code).stdout


POLICY = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from fastkv.backends import BACKEND_NAMES, get_backend, resolve
from helpers.recording import RecordingOps
from helpers.sentinels import FORMATS, Sliceable, bare_layer, neighboured_spec, sentinel_meta

count = 0
for fmt in FORMATS:
    spec, layer = neighboured_spec(fmt), bare_layer(fmt, 1)
    for name in BACKEND_NAMES:
        for num_decode in (0, 2, 5):
            meta = sentinel_meta(spec, num_decode=num_decode)
            assert resolve(meta.caches, layer, spec).k is meta.caches[4]
            ops = RecordingOps()
            get_backend(spec, name=name, ops=ops).forward_mixed(Sliceable("qkv", 9, 9), layer, meta)
            count += len(ops.calls)
print(count)
"""


def test_resolve_and_forward_mixed_load_no_array_library(run_python):
    calls, loaded = run_python(POLICY + LOADED).stdout.split("\n")[:2]
    # Per format: append 3 * 2 calls; both others 5, 6 and 2.
    assert int(calls) == 5 * (3 * 2 + 2 * (5 + 6 + 2))
    assert loaded == "[]"


def test_public_names_load_on_first_use(run_python):
    code = """
import sys
import fastkv
before = set(sys.modules)
assert sorted(dir(fastkv)) == sorted(fastkv.__all__)
assert not any(name in vars(fastkv) for name in fastkv.__all__ if name != "__version__")
for name in fastkv.__all__:
    assert getattr(fastkv, name) is not None, name
    assert name in vars(fastkv), name
print(len(set(sys.modules) - before) > 5)
"""
    done = run_python(code + LOADED)
    assert done.stdout.split("\n")[:2] == ["True", "[]"]


@pytest.mark.parametrize("name", fastkv.__all__)
def test_each_public_name_can_be_the_first(name, run_python):
    code = f"from fastkv import {name} as it; import fastkv; print(it is fastkv.{name})"
    assert run_python(code).stdout.strip() == "True"


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="'fastkv' has no attribute 'nope'"):
        _ = fastkv.nope
    with pytest.raises(ImportError, match="nope"):
        exec("from fastkv import nope")


# --- in the source ----------------------------------------------------------------------------


def imported_at_module_level(tree):
    """Roots of what is imported when a module is, TYPE_CHECKING blocks left out."""
    found, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", sources(*PURE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_policy_imports_no_array_library_at_module_level(path):
    assert imported_at_module_level(ast.parse(path.read_text("utf-8"))) & ARRAYS == set()


def test_the_import_search_finds_imports():
    code = """
import numpy as np
class C:
    from torch import nn
try:
    import cupy.cuda
except ImportError:
    pass
if TYPE_CHECKING:
    import paddle
else:
    import ml_dtypes
def f():
    import safetensors
"""
    assert imported_at_module_level(ast.parse(code)) & ARRAYS == {
        "numpy",
        "torch",
        "cupy",
        "ml_dtypes",
    }


def formats_compared(tree):
    """Comparisons and cases that spell out a format's name."""
    names = {quant.value for quant in QuantType}
    members = {quant.name for quant in QuantType}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare | ast.match_case):
            continue
        for part in ast.walk(node if isinstance(node, ast.Compare) else node.pattern):
            spelled = isinstance(part, ast.Constant) and part.value in names
            # A format's name, and a word that other things are called by.
            if spelled and part.value == "none":
                spelled = re.search("quant|format|fmt|name", ast.unparse(node)) is not None
            member = (
                isinstance(part, ast.Attribute)
                and part.attr in members
                and ast.unparse(part.value).endswith("QuantType")
            )
            if spelled or member:
                found.append(f"line {part.lineno}: {ast.unparse(part)}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_code_asks_for_a_format_by_name(path):
    if str(path.relative_to(PACKAGE).as_posix()) not in SPELLED_OUT:
        assert formats_compared(ast.parse(path.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        'if quant == "cache_int4_zp": pass',
        'x = 1 if name in ("none", "cache_fp8") else 2',
        "if quant.name is QuantType.CACHE_INT8: pass",
        "while not q != quant.QuantType.NONE: pass",
        'match name:\n    case "block_wise_fp8": pass',
        'if cache.quant.name.value != "none": pass',
    ],
)
def test_the_comparison_search_finds_comparisons(code):
    assert formats_compared(ast.parse(code))


def test_the_comparison_search_leaves_tables_alone():
    assert formats_compared(ast.parse('x = {"none": 1}["none"]; y = QuantType.NONE')) == []
