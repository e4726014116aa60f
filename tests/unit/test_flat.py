# SPDX-License-Identifier: Apache-2.0
"""What a bundle keeps of itself for the contracts changes nothing of the bundle."""

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from fastkv import CacheSpec, LayerCache, Rope, StaticScales
from fastkv.contracts.remember import _flat

SCALES = StaticScales(*"abcd")
BUNDLES = [
    LayerCache(CacheSpec(1, 2, 8, 4, "cache_int8"), 0, "k", "v", static=SCALES),
    Rope("cos", "sin", True),
    StaticScales(*"abcdef"),
]


@pytest.fixture(params=BUNDLES, ids=lambda bundle: type(bundle).__name__)
def pair(request):
    """A bundle that was taken apart, and one that was not."""
    taken, other = replace(request.param), replace(request.param)
    _flat(taken)
    return taken, other


def test_equality_hash_and_looks_stay(pair):
    taken, other = pair
    assert taken == other
    assert repr(taken) == repr(other)
    assert asdict(taken) == asdict(other)
    assert "_flat" not in {field.name for field in fields(taken)}
    assert not hasattr(taken, "__dict__")
    if not isinstance(taken, LayerCache):  # whose spec may hold a list
        assert hash(taken) == hash(other)


@pytest.mark.parametrize(
    "made",
    [copy.copy, copy.deepcopy, replace, lambda bundle: pickle.loads(pickle.dumps(bundle))],
    ids=["copy", "deepcopy", "replace", "pickle"],
)
def test_another_bundle_takes_itself_apart(pair, made):
    taken, other = pair
    again = made(taken)
    assert again == taken
    assert not hasattr(again, "_flat")
    assert hasattr(taken, "_flat")
    assert not hasattr(other, "_flat")
    assert pickle.dumps(taken) == pickle.dumps(other)


def test_it_stays_frozen(pair):
    with pytest.raises(FrozenInstanceError):
        setattr(pair[0], fields(pair[0])[0].name, None)


def test_tensors_come_in_order_without_those_that_are_absent():
    cache, rope, scales = map(replace, BUNDLES)
    assert _flat(cache)[1] == ("k", "v", "a", "b", "c", "d")
    assert _flat(rope)[1] == ("cos", "sin")
    assert _flat(scales)[1] == tuple("abcdef")
    assert _flat(scales)[0] != _flat(SCALES)[0]
