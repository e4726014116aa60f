# SPDX-License-Identifier: Apache-2.0
"""What launchers do at each call: addresses, alignment, fault word, launch, results."""

from types import SimpleNamespace

import pytest

from fastkv.arrays import ArrayInfo
from fastkv.contracts.tensors import Checker
from fastkv.errors import UnsupportedError
from fastkv.ops import dispatch
from fastkv.ops.cuda import faults, paged_attention, tensors
from fastkv.ops.cuda.plan import Plan
from fastkv.scales import FIELDS


class Kernel:
    index = 3

    def __init__(self):
        self.launched = []

    def launch(self, *args):
        self.launched.append(args)


@pytest.fixture
def plan():
    library = SimpleNamespace(pointer=lambda tensor: tensor["at"], stream=lambda index: 70 + index)
    return Plan(Kernel(), 5, library, b"constants")


def test_addresses_are_read_at_each_call(plan):
    moved = {"at": 16}
    assert plan.addresses((moved, None, {"at": 48})) == [16, 0, 48]
    moved["at"] = 32
    assert plan.addresses((moved,)) == [32]


def test_the_stream_is_that_of_the_kernels_device(plan):
    assert plan.stream() == 73


@pytest.mark.parametrize("word", [0, 4096])
def test_a_struct_is_addresses_fault_word_constants_scalars(plan, word, monkeypatch, mocker):
    asked, noted = mocker.Mock(return_value=word), mocker.Mock()
    monkeypatch.setattr(faults, "word", asked)
    monkeypatch.setattr(faults, "raise_noted", noted)
    plan.launch("checker", 7, [16, 0, 32], 1, 0.5)
    assert plan.kernel.launched == [(7, 5, 16, 0, 32, word, b"constants", 1, 0.5)]
    asked.assert_called_once_with(3, 7)
    assert noted.call_args_list == ([mocker.call("checker", word, 7)] if word else [])


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_first_odd_address_is_refused_by_name(wrong):
    addresses = [160, 0, 48, 52]
    addresses[wrong] += 8
    with pytest.raises(UnsupportedError) as caught:
        tensors.require_aligned(Checker("some_op"), ("q", "k", "v"), addresses)
    assert (caught.value.op, caught.value.argument) == ("some_op", "qkv"[wrong])
    assert caught.value.got == f"address {addresses[wrong]:#x}"


def test_addresses_behind_the_names_may_be_odd():
    tensors.require_aligned(Checker("op"), ("q", "k"), [16, 32, 4])


@pytest.mark.parametrize(
    ("place", "name"), [(0, "q"), (1, "out"), (3, "cache.k"), (4, "cache.v"), (14, "mask_offsets")]
)
def test_what_attention_loads_at_once_is_aligned(place, name):
    addresses = [4] * 16
    for aligned in (0, 1, 3, 4):
        addresses[aligned] = 160
    addresses[14] = 8
    paged_attention._require_aligned(Checker("op"), addresses)
    addresses[place] += 4
    with pytest.raises(UnsupportedError) as caught:
        paged_attention._require_aligned(Checker("op"), addresses)
    assert caught.value.argument == name


def test_a_bundle_that_is_not_there_has_every_field_of_one():
    assert vars(tensors.NO_STATIC) == dict.fromkeys(FIELDS)


# Results


@pytest.fixture
def checker(monkeypatch):
    """On a GPU of a library that counts what it is asked for."""
    found = Checker("op", T=2, Hq=3)
    found.first = ArrayInfo("lib", "cuda:3", "float16", (2, 3))
    found.asked = []

    def maker(*args):
        found.asked.append(args)
        return lambda: [*args]

    monkeypatch.setattr("fastkv.arrays.on_device", lambda name: SimpleNamespace(maker=maker))
    return found


def test_each_result_is_new_and_its_maker_is_asked_for_once(checker):
    one, two = (dispatch.result(checker, ("T", "Hq"), "float32") for _ in range(2))
    assert one == [(2, 3), "float32", 3] == two
    assert one is not two
    assert dispatch.result(checker, ("Hq",), "float32") == [(3,), "float32", 3]
    assert dispatch.result(checker, ("Hq",), "float16") == [(3,), "float16", 3]
    assert len(checker.asked) == 3


def test_a_kernel_does_without_a_result_that_nobody_needs(checker):
    assert dispatch.result(checker, ("T",), "float32", needed=False) is None
    assert checker.asked == []


@pytest.mark.parametrize("needed", [True, False])
def test_a_result_elsewhere_is_refused(checker, needed):
    checker.first = checker.first._replace(device="xpu:0")
    with pytest.raises(UnsupportedError, match="xpu:0"):
        dispatch.result(checker, ("T",), "float32", needed=needed)
    assert checker.asked == []
