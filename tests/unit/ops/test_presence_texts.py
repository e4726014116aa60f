# SPDX-License-Identifier: Apache-2.0
"""What counts as a number, and the texts of presence that no op reaches by itself."""

from types import SimpleNamespace

import pytest

from fastkv import Rope
from fastkv.contracts.numbers import is_integer, is_number
from fastkv.contracts.presence import require_kind, require_static, require_tensor
from fastkv.errors import ContractError
from fastkv.quant import quant_spec
from fastkv.scales.bundle import FIELDS
from helpers.calls import legal_call

INT8 = quant_spec("cache_int8")


@pytest.mark.parametrize("value", ["1", 1.5, None, True, [1]])
def test_no_integer(value):
    assert not is_integer(value)
    assert is_number(value) == (value == 1.5)


@pytest.mark.parametrize("value", [None, 3])
def test_kind(value):
    with pytest.raises(ContractError) as caught:
        require_kind("op", "rope", value, Rope, INT8)
    got = "None" if value is None else "int"
    assert str(caught.value) == f"op: rope (format cache_int8): expected a Rope, got {got}"


def test_got_is_a_text():
    with pytest.raises(ContractError) as caught:
        require_tensor("op", "k", None, "a tensor")
    assert caught.value.got == "None"


def test_zero_points_on_a_format_without():
    with pytest.raises(ContractError) as caught:
        require_static("op", "static", SimpleNamespace(**dict.fromkeys(FIELDS, 3)), INT8)
    assert str(caught.value) == (
        "op: static.k_zp (format cache_int8): expected None: the format has no zero points, got int"
    )


def test_a_layer_outside_names_the_op():
    call = legal_call("gather_kv")
    call["cache.layer_id"] = 1
    assert str(call.raises(ContractError)) == "gather_kv: layer_id: expected 0 to 0, got 1"
