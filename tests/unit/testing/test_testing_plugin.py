# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin, in suites of somebody else: fixtures, a readable failure, nothing more."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import fastkv.testing

HEAVY = ("numpy", "ml_dtypes", "cupy", "torch", "paddle", "safetensors", "pytest")


@pytest.fixture
def run_suite(pytester):
    """Run a test module of a stranger, in a process of its own, with warnings as errors."""

    def run(code, *options):
        pytester.makepyfile(code)
        return pytester.runpytest_subprocess("-W", "error", "-p", "no:cacheprovider", *options)

    return run


def test_the_plugin_is_registered():
    (found,) = entry_points(group="pytest11", name="fastkv")
    assert found.value == "fastkv.testing.plugin"


def test_every_suite_has_the_fixtures_and_no_hook(run_suite):
    result = run_suite("", "--fixtures")
    for name in ("recording_ops", "sentinel_spec", "stub_module"):
        result.stdout.re_match_lines([rf"{name} -- .*fastkv.testing.plugin.py:\d+"])
    plugin = entry_points(group="pytest11", name="fastkv")["fastkv"].load()
    assert [name for name in dir(plugin) if name.startswith("pytest_")] == []


def test_a_suite_that_does_not_use_it_loads_nothing(run_suite):
    result = run_suite(
        """
        import sys

        def test_modules():
            loaded = {name for name in sys.modules if name.partition(".")[0] == "fastkv"}
            assert loaded == {"fastkv", "fastkv.testing", "fastkv.testing.plugin"}
            heavy = {"numpy", "ml_dtypes", "cupy", "torch", "paddle", "safetensors", "typer"}
            assert not heavy & set(sys.modules)
        """
    )
    result.assert_outcomes(passed=1)


def test_the_fixtures_work(run_suite):
    result = run_suite(
        """
        import sys
        import pytest
        from fastkv.backends import AppendBackend
        from fastkv.testing import sentinel_caches, sentinel_layer, sentinel_meta, sentinel_qkv

        def test_ops(recording_ops, sentinel_spec):
            spec = sentinel_spec
            assert spec.num_layers == 5
            assert len({spec.layer_quant(i).name for i in range(5)}) == 5
            meta = sentinel_meta(spec, sentinel_caches(spec))
            AppendBackend(recording_ops).forward_mixed(
                sentinel_qkv(spec), sentinel_layer(spec, 4), meta
            )
            assert recording_ops.names() == ["rope_write_kv", "paged_attention"]
            assert recording_ops.only("paged_attention").arguments["cache"].k is meta.caches[8]
            assert "numpy" not in sys.modules

        def test_ops_are_new(recording_ops):
            assert recording_ops.calls == []

        @pytest.mark.parametrize("sentinel_spec", ["block_wise_fp8"], indirect=True)
        def test_one_format(sentinel_spec):
            assert (sentinel_spec.num_layers, sentinel_spec.num_tensors) == (3, 12)

        @pytest.mark.parametrize("sentinel_spec", [["none", "block_wise_fp8"]], indirect=True)
        def test_some_formats(sentinel_spec):
            assert (sentinel_spec.num_layers, sentinel_spec.num_tensors) == (2, 6)

        def test_stub(stub_module):
            ops = stub_module("engine.ops.gpu", write=len)
            stub_module("engine.ops.cpu")
            from engine.ops.gpu import write
            assert (write, sys.modules["engine.ops.gpu"]) == (len, ops)

        def test_stub_is_gone():
            assert [name for name in sys.modules if name.startswith("engine")] == []
        """
    )
    result.assert_outcomes(passed=6)


def test_fixtures_of_the_suite_come_first(run_suite):
    result = run_suite(
        """
        import pytest

        @pytest.fixture
        def stub_module():
            return "mine"

        def test_mine(stub_module):
            assert stub_module == "mine"
        """
    )
    result.assert_outcomes(passed=1)


def test_the_failure_names_format_layer_op_argument_and_the_tensor_that_came(run_suite):
    result = run_suite(
        """
        import pytest
        from dataclasses import replace
        from fastkv.backends import AppendBackend
        from fastkv.testing import conformance

        class Swapped(AppendBackend):
            def _forward(self, qkv, cache, options, meta):
                swapped = replace(cache, k_scale=cache.v_scale, v_scale=cache.k_scale)
                return super()._forward(qkv, swapped, options, meta)

        cases = conformance.cases(formats=["block_wise_fp8", "none"], layouts=["uniform"])

        @pytest.mark.parametrize("case", cases, ids=str)
        def test_conformance(case):
            conformance.check(case, Swapped)
        """
    )
    result.assert_outcomes(failed=12, passed=12)
    result.stdout.fnmatch_lines(
        [
            "*_ test_conformance[[]block_wise_fp8-uniform-attributes-layer1-mixed] _*",
            "E *rope_write_kv: cache.k_scale (format block_wise_fp8; layer 1 of 5, uniform list, "
            "mixed): expected <caches[[]6] = layer 1's k_scale>, "
            "got <caches[[]7] = layer 1's v_scale>",
        ]
    )
    # The test's own line, and no code of the suite.
    assert "check.py" not in result.stdout.str()


def test_the_text_that_the_documentation_quotes_is_real(request):
    from dataclasses import replace

    from fastkv.backends import AppendBackend
    from fastkv.testing import conformance

    class Swapped(AppendBackend):
        def _forward(self, qkv, cache, options, meta):
            static = replace(
                cache.static, k_dequant=cache.static.v_dequant, v_dequant=cache.static.k_dequant
            )
            return super()._forward(qkv, replace(cache, static=static), options, meta)

    (case,) = [
        case
        for case in conformance.cases(formats=["cache_int8"])
        if str(case) == "cache_int8-mixed-attributes-layer1-mixed"
    ]
    with pytest.raises(conformance.ConformanceError) as caught:
        conformance.check(case, Swapped)
    page = (request.config.rootpath / "docs" / "testing.md").read_text("utf-8")
    quoted = " ".join(page.split())
    (read,) = [f for f in caught.value.faults if f.op == "paged_attention" and "v_" in f.argument]
    assert str(read) in quoted


# --- what an import costs -------------------------------------------------------------------------

LOADED = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
USE = """
import fastkv.testing as kit
for name in kit.__all__:
    assert getattr(kit, name) is not None, name
    assert name in vars(kit), name
from fastkv.backends import FlashBackend
kit.conformance.check_backend(FlashBackend)
with kit.stub_module("a.b"):
    import a.b
"""


@pytest.mark.parametrize("code", ["import fastkv.testing", USE], ids=["import", "use"])
def test_neither_an_array_library_nor_pytest_is_loaded(code, run_python):
    assert run_python(f"{code}\n{LOADED}").stdout.strip() == "[]"


def test_the_probe_finds_what_is_loaded(run_python):
    found = run_python(f"import fastkv.testing.plugin, numpy\n{LOADED}").stdout
    assert {"numpy", "pytest"} <= set(found.replace("'", "").strip("[]\n").split(", "))


def test_names_load_on_first_use(run_python):
    code = "import fastkv.testing, sys; print([n for n in sys.modules if n.startswith('fastkv')])"
    assert run_python(code).stdout.strip() == "['fastkv', 'fastkv.testing']"


@pytest.mark.parametrize("name", fastkv.testing.__all__)
def test_each_name_can_be_the_first(name, run_python):
    code = f"from fastkv.testing import {name} as it; import fastkv.testing as kit"
    code += f"; print(it is kit.{name})"
    assert run_python(code).stdout.strip() == "True"
    assert name in dir(fastkv.testing)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"'fastkv.testing' has no attribute 'nope'"):
        _ = fastkv.testing.nope


def test_python_runs_the_suite_without_pytest_installed(tmp_path):
    # `conformance` in a script: nothing of it needs a test runner.
    code = "import sys; sys.modules['pytest'] = None\n" + USE + "print('ran')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "ran"
