# SPDX-License-Identifier: Apache-2.0
"""The table of formats: what the specification says of each, and that nobody goes round it."""

import ast
import copy
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import fastkv
from fastkv.errors import ContractError, UnknownNameError
from fastkv.ops.reference.codecs import CODECS
from fastkv.quant import QUANT_SPECS, Granularity, QuantSpec, QuantType, ScaleKind, quant_spec

SCALES = ("k_quant", "k_dequant", "v_quant", "v_dequant")
HEAD, CHANNEL = Granularity.HEAD, Granularity.CHANNEL

# The design's table of formats: storage, elements per item, scale, granularities, static fields,
# tensors per layer.
FORMATS = {
    "none": (None, 1, "none", set(), (), 2),
    "cache_int8": ("int8", 1, "static", {HEAD, CHANNEL}, SCALES, 2),
    "cache_fp8": ("float8_e4m3fn", 1, "static", {HEAD}, SCALES, 2),
    "cache_int4_zp": ("uint8", 2, "static", {CHANNEL}, (*SCALES, "k_zp", "v_zp"), 2),
    "block_wise_fp8": ("float8_e4m3fn", 1, "dynamic", set(), (), 4),
}
CODES = {
    "none": (None, None, None),
    "cache_int8": (-127, 127, 127),
    "cache_fp8": (-448, 448, 448),
    "cache_int4_zp": (-8, 7, 7),
    "block_wise_fp8": (-448, 448, 448),
}


def test_table_has_exactly_the_five_formats():
    assert set(QUANT_SPECS) == {quant.value for quant in QuantType} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_row_says_what_the_specification_says(name):
    row = QUANT_SPECS[name]
    storage, packed, scale, granularities, static_fields, tensors = FORMATS[name]
    assert row.name is QuantType(name)
    assert (row.storage, row.elements_per_item, row.scale.value) == (storage, packed, scale)
    assert set(row.granularities) == granularities
    assert row.static_fields == static_fields
    assert row.tensors_per_layer == tensors
    assert row.needs_static == (scale == "static")
    assert row.needs_paged_scales == (tensors == 4)
    assert row.needs_zp == ("k_zp" in static_fields)
    assert (row.code_min, row.code_max, row.bound) == CODES[name]
    assert row.summary


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_found_by_string_by_type_and_by_row(name):
    row = QUANT_SPECS[name]
    assert quant_spec(name) is row
    assert quant_spec(QuantType(name)) is row
    assert quant_spec(row) is row
    assert str(QuantType(name)) == name == f"{QuantType(name)}"


def test_every_format_has_one_codec():
    assert set(CODECS) == set(QuantType)


@pytest.mark.parametrize("name", FORMATS)
def test_row_cannot_be_changed(name):
    with pytest.raises(FrozenInstanceError):
        QUANT_SPECS[name].needs_zp = True
    with pytest.raises(TypeError):
        QUANT_SPECS[name] = QUANT_SPECS["none"]


@pytest.mark.parametrize("name", FORMATS)
def test_row_stays_one_object_in_another_process_and_in_a_copy(name):
    row = QUANT_SPECS[name]
    assert pickle.loads(pickle.dumps(row)) is row
    assert copy.deepcopy(row) is row


class PrintsAsAFormat:
    def __repr__(self):
        return "cache_int8"


@pytest.mark.parametrize(
    "name",
    ["cache_int9", "int8", "CACHE_FP8", "", None, 8, ["none"], b"none", PrintsAsAFormat()],
    ids=repr,
)
def test_unknown_format_raises_with_the_table(name):
    with pytest.raises(UnknownNameError) as caught:
        quant_spec(name, op="some_op", argument="some_argument")
    error = caught.value
    assert isinstance(error, ContractError)
    assert isinstance(error, ValueError)
    assert (error.op, error.argument, error.got) == ("some_op", "some_argument", repr(name))
    assert error.expected == f"one of {', '.join(FORMATS)}"
    assert str(error).startswith(f"some_op: some_argument: expected {error.expected}, got {name!r}")


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("cache_int_8", "cache_int8"),
        ("cache_fp_8", "cache_fp8"),
        ("cache_int4", "cache_int4_zp"),
        ("blockwise_fp8", "block_wise_fp8"),
    ],
)
def test_misspelt_format_is_suggested(misspelt, meant):
    with pytest.raises(UnknownNameError, match=f"Did you mean '{meant}'"):
        quant_spec(misspelt)


def test_enumerations_print_as_their_values():
    assert [str(kind) for kind in Granularity] == ["head", "channel"]
    assert {kind.value for kind in ScaleKind} == {"none", "static", "dynamic"}


# A table, not a ladder


def names_a_format(node):
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "QuantType"
    return isinstance(node, ast.Constant) and node.value in set(FORMATS) - {"none"}


def comparisons_with_a_format(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        compared = []
        if isinstance(node, ast.Compare):
            compared = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
        elif isinstance(node, ast.match_case):
            compared = list(ast.walk(node.pattern))
        found += [node for part in compared if names_a_format(part)]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "if quant == 'cache_int8': pass",
        "x = 1 if name in ('cache_fp8', 'cache_int8') else 2",
        "if QuantType.NONE is quant: pass",
        "match quant:\n    case 'cache_int8': pass",
    ],
)
def test_search_finds_a_comparison_with_a_format(line):
    assert comparisons_with_a_format(line)


def test_no_source_compares_with_the_name_of_a_format():
    package = Path(fastkv.__file__).parent
    sources = sorted(package.rglob("*.py"))
    assert package / "quant.py" in sources
    guilty = [
        str(path.relative_to(package))
        for path in sources
        if comparisons_with_a_format(path.read_text(encoding="utf-8"))
    ]
    assert guilty == []


def test_rows_are_quant_specs():
    assert all(type(row) is QuantSpec for row in QUANT_SPECS.values())
