# SPDX-License-Identifier: Apache-2.0
"""`stub_module`: found by every way to import, and gone without a trace."""

import importlib
import importlib.util
import json
import sys
from types import ModuleType

import pytest

from fastkv.errors import ContractError
from fastkv.testing import stub_module


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):  # which import modules themselves
    modules, attributes = dict(sys.modules), dict(vars(json))
    yield
    assert {name: sys.modules.get(name) for name in modules} == modules
    assert set(sys.modules) - set(modules) == set()
    assert dict(vars(json)) == attributes


def test_parents_are_made_and_attached():
    with stub_module("stubbed.inner.ops", launch=len) as ops:
        import stubbed.inner.ops
        from stubbed.inner import ops as again
        from stubbed.inner.ops import launch

        assert isinstance(ops, ModuleType)
        assert ops is again is stubbed.inner.ops is sys.modules["stubbed.inner.ops"]
        assert launch is len
        assert importlib.import_module("stubbed.inner") is stubbed.inner
    assert "stubbed" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="stubbed"):
        importlib.import_module("stubbed")


def test_one_that_has_no_parent():
    with stub_module("stubbed", answer=42):
        assert importlib.import_module("stubbed").answer == 42


def test_what_was_not_stubbed_is_absent():
    with stub_module("stubbed.ops", here=1):
        with pytest.raises(ImportError, match="cannot import name 'gone'"):
            exec("from stubbed.ops import gone")
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'stubbed.other'$"):
            importlib.import_module("stubbed.other")


@pytest.mark.parametrize("name", ["stubbed", "stubbed.ops"])
def test_code_that_asks_whether_it_is_installed_finds_it(name):
    with stub_module("stubbed.ops"):
        assert importlib.util.find_spec(name).name == name
    assert importlib.util.find_spec("stubbed") is None


def test_below_a_real_module():
    assert not hasattr(json, "gpu")
    with stub_module("json.gpu.kernels") as kernels:
        assert importlib.import_module("json.gpu.kernels") is kernels
        assert sys.modules["json"] is json
        assert json.gpu.kernels is kernels
        assert json.loads("3") == 3
    assert not hasattr(json, "gpu")


def test_in_place_of_a_real_module():
    real = json.decoder
    with stub_module("json.decoder", JSONDecoder=None) as stub:
        assert json.decoder is stub is sys.modules["json.decoder"]
    assert json.decoder is real is sys.modules["json.decoder"]


def test_a_real_parent_that_is_not_loaded_yet_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "realparent"
    package.mkdir()
    (package / "__init__.py").write_text("real = True")
    (package / "sibling.py").write_text("value = 5")
    monkeypatch.syspath_prepend(tmp_path)
    with stub_module("realparent.gpu.ops") as ops:
        import realparent

        assert realparent.real
        assert realparent.gpu.ops is ops
        assert importlib.import_module("realparent.sibling").value == 5
    # Imported is imported; the stub below it is gone.
    assert sys.modules["realparent"] is realparent
    assert not hasattr(realparent, "gpu")
    assert [name for name in sys.modules if name.startswith("realparent.gpu")] == []
    del sys.modules["realparent"], sys.modules["realparent.sibling"]


def test_a_real_parent_that_cannot_be_imported_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "brokenparent.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        stub_module("brokenparent.ops").__enter__()


def test_undone_after_an_exception():
    with pytest.raises(KeyError), stub_module("json.gpu"), stub_module("stubbed.ops"):
        raise KeyError


def test_nested_below_the_same_parent():
    with stub_module("stubbed.one") as one:
        parent = sys.modules["stubbed"]
        with stub_module("stubbed.two") as two:
            assert sys.modules["stubbed"] is parent
            assert (parent.one, parent.two) == (one, two)
        assert sys.modules["stubbed"] is parent
        assert parent.one is one
        assert not hasattr(parent, "two")
        assert "stubbed.two" not in sys.modules


def test_nested_with_the_same_name():
    with stub_module("stubbed.ops", version=1) as outer:
        with stub_module("stubbed.ops", version=2):
            assert importlib.import_module("stubbed.ops").version == 2
        assert importlib.import_module("stubbed.ops") is outer
        assert sys.modules["stubbed"].ops is outer


def test_undone_when_the_code_under_test_tidied_up_itself():
    with stub_module("json.gpu"):
        del sys.modules["json.gpu"], json.gpu


def test_a_blocked_parent_is_stubbed_and_blocked_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "blocked", None)
    with stub_module("blocked.ops") as ops:
        assert importlib.import_module("blocked").ops is ops
    assert sys.modules["blocked"] is None
    monkeypatch.undo()


def test_a_lazy_parent_does_not_load_what_is_hidden(monkeypatch):
    lazy = ModuleType("lazyparent")
    lazy.__getattr__ = lambda name: pytest.fail(f"loaded {name}")
    monkeypatch.setitem(sys.modules, "lazyparent", lazy)
    with stub_module("lazyparent.ops") as ops:
        assert lazy.ops is ops
    assert "ops" not in vars(lazy)
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["", "a..b", ".a", "a.", "a-b"])
def test_a_name_that_no_module_can_have(name):
    with pytest.raises(ContractError, match="name: expected a dotted name"):
        stub_module(name).__enter__()
