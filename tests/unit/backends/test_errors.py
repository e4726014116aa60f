# SPDX-License-Identifier: Apache-2.0
"""What fastkv raises: five facts in the text and as attributes, and a way between processes."""

import copy
import inspect
import pickle

import pytest

from fastkv import errors
from fastkv.errors import (
    CollectiveError,
    ContractError,
    FastKVError,
    FingerprintError,
    MalformedError,
    MissingDependencyError,
    SelectionError,
    TransferError,
    unknown_name,
)

RAISED = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, FastKVError) and cls.__module__ == "fastkv.errors"
]
CONTRACT = [cls for cls in RAISED if issubclass(cls, ContractError)]
#: Built-in exceptions that callers may catch as well.
BUILT_IN = {
    "DtypeError": TypeError,
    "LayerIndexError": IndexError,
    "UnsupportedError": NotImplementedError,
    "MissingDependencyError": ImportError,
    "SelectionError": ValueError,
    "CollectiveError": RuntimeError,
    "BlockIdError": IndexError,
    "FingerprintError": ValueError,
    "MalformedError": ValueError,
    "TransferError": RuntimeError,
    "MissingTensorError": ValueError,
}


#: Arguments of the classes that are no `ContractError`.
SAMPLES = {
    FastKVError: ("something",),
    SelectionError: ("'auto' on cpu", [("append", "no a; no b"), ("flash", "no c")]),
    MissingDependencyError: ("A torch tensor", "torch", "pip install 'fastkv[torch]'"),
    CollectiveError: ("merge", 1, 2, "timed out"),
    FingerprintError: ("connect", [("head_dim", "64", "128"), ("model", "'a'", "'b'")]),
    MalformedError: ("Fingerprint.decode", "no JSON"),
    TransferError: ("Endpoint.connect", "no hello within 5 s"),
}


def one_of(cls):
    if cls in SAMPLES:
        return cls(*SAMPLES[cls])
    return cls(
        "gather_kv", "cache.k", expected="a tensor", got="None", format="cache_int8", hint="Do so."
    )


def test_there_are_errors():
    assert len(CONTRACT) > 10
    assert {SelectionError, MissingDependencyError} <= set(RAISED)


@pytest.mark.parametrize("cls", CONTRACT)
def test_text_has_the_five_facts(cls):
    error = one_of(cls)
    assert str(error) == (
        "gather_kv: cache.k (format cache_int8): expected a tensor, got None. Do so."
    )
    assert error.args == (str(error),)
    facts = (error.op, error.argument, error.format, error.expected, error.got, error.hint)
    assert facts == ("gather_kv", "cache.k", "cache_int8", "a tensor", "None", "Do so.")


def test_text_without_format_and_hint():
    error = ContractError("copy_pages", "src", expected="[n]", got="[2, 3]")
    assert str(error) == "copy_pages: src: expected [n], got [2, 3]"
    assert (error.format, error.hint) == (None, "")


@pytest.mark.parametrize("cls", RAISED)
@pytest.mark.parametrize(
    "back",
    [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy],
    ids=["pickle", "copy", "deepcopy"],
)
def test_there_and_back(cls, back):
    error = one_of(cls)
    other = back(error)
    assert type(other) is cls
    assert other is not error
    assert str(other) == str(error)
    assert vars(other) == vars(error)


@pytest.mark.parametrize(("name", "built_in"), BUILT_IN.items())
def test_built_in_bases(name, built_in):
    assert issubclass(getattr(errors, name), built_in)


@pytest.mark.parametrize("cls", CONTRACT)
def test_every_contract_error_is_a_value_error(cls):
    assert issubclass(cls, ValueError)


def test_selection_error_has_every_reason():
    text = str(one_of(SelectionError))
    assert text == (
        "select_backend: no backend serves 'auto' on cpu: append: no a; no b; flash: no c"
    )


def test_missing_dependency_is_the_line_that_installs_it():
    error = one_of(MissingDependencyError)
    assert str(error).endswith("pip install 'fastkv[torch]'")
    assert "torch, which is not installed" in str(error)


@pytest.mark.parametrize(
    ("got", "suggestion"),
    [
        ("alpha_bet", "alpha_beta"),
        ("BETA", "beta"),
        ("bet", "beta"),
        ("gam", "gamma_x"),
        ("zzz", None),
        ("", None),
        (None, None),
    ],
)
def test_suggestions(got, suggestion):
    error = unknown_name("op", "argument", got, iter(["alpha_beta", "beta", "gamma_x"]))
    assert error.expected == "one of alpha_beta, beta, gamma_x"
    assert error.got == repr(got)
    assert error.hint == (f"Did you mean {suggestion!r}?" if suggestion else "")
