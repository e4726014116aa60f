# SPDX-License-Identifier: Apache-2.0
"""`Fingerprint`: every difference shows, nothing else does, and hostile bytes are refused."""

import json
from dataclasses import fields, replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkv import StaticScales
from fastkv.errors import FingerprintError, MalformedError, MissingTensorError, SpecError
from fastkv.transfer.fingerprint import MAX_ENCODED, Fingerprint
from helpers.transfer import spec_of

SPEC = spec_of()
HEADS, DIM = 3, 16


def scales(seed, shape=(HEADS, DIM), zp=False, dtype="float32"):
    rng = np.random.default_rng(seed)
    arrays = [rng.uniform(0.5, 2, shape).astype(dtype) for _ in range(6 if zp else 4)]
    return StaticScales(*arrays)


STATIC = {1: scales(1), 3: scales(3, zp=True)}
BASE = Fingerprint.of(SPEC, model="m", scales=STATIC)
CHANGES = {
    "version": 2,
    "model": "n",
    "num_layers": 5,
    "num_kv_heads": 2,
    "shard_rank": 1,
    "shard_size": 2,
    "head_dim": 32,
    "page_size": 8,
    "dtype": "bfloat16",
    "formats": (*BASE.formats[:3], "none"),
    "scale_dtype": "float16",
    "granularities": ("", "head", "", "channel"),
    "scales_digest": "0" * 32,
}


def test_a_spec_is_spelled_out():
    assert replace(BASE, scales_digest="") == Fingerprint(
        version=1,
        model="m",
        num_layers=4,
        num_kv_heads=3,
        shard_rank=0,
        shard_size=1,
        head_dim=16,
        page_size=4,
        dtype="float16",
        formats=("block_wise_fp8", "cache_int8", "none", "cache_int4_zp"),
        scale_dtype="float32",
        granularities=("", "channel", "", "channel"),
        scales_digest="",
    )


@pytest.mark.parametrize("name", [field.name for field in fields(Fingerprint)])
def test_a_field_that_differs_is_named_with_both_values(name):
    other = replace(BASE, **{name: CHANGES[name]})
    assert BASE.differences(other) == (name,)
    assert other.digest != BASE.digest
    with pytest.raises(FingerprintError, match=f"^connect: the peer's cache differs in {name}: "):
        BASE.require_equal(other, "connect")


def test_an_error_names_all_fields_and_both_sides():
    other = replace(BASE, head_dim=32, model="n")
    with pytest.raises(FingerprintError) as caught:
        BASE.require_equal(other, "connect")
    assert caught.value.differences == (("model", "'m'", "'n'"), ("head_dim", "16", "32"))
    assert "head_dim: ours 16, theirs 32" in str(caught.value)


def test_equal_caches_are_equal():
    again = Fingerprint.of(spec_of(), model="m", scales={1: scales(1), 3: scales(3, zp=True)})
    again.require_equal(BASE, "connect")
    assert (again.digest, again.encode()) == (BASE.digest, BASE.encode())
    assert len(BASE.digest) == 32


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("field", ["k_quant", "k_dequant", "v_quant", "v_dequant", "k_zp", "v_zp"])
def test_one_bit_of_one_scale_shows(layer, field):
    old = getattr(STATIC[layer], field)
    if old is None:
        assert (layer, field[1:]) == (1, "_zp")
        return
    new = old.copy()
    new.view(np.uint32)[1, 5] ^= 1
    changed = {**STATIC, layer: replace(STATIC[layer], **{field: new})}
    assert Fingerprint.of(SPEC, model="m", scales=changed).differences(BASE) == ("scales_digest",)


def test_two_layers_or_two_fields_that_change_places_show():
    spec = spec_of("cache_int8")
    one, other = scales(1), scales(2)
    digests = {
        Fingerprint.of(spec, model="m", scales=found).scales_digest
        for found in (
            {0: one, 1: other},
            {0: other, 1: one},
            {0: replace(one, k_quant=one.v_quant, v_quant=one.k_quant), 1: other},
        )
    }
    assert len(digests) == 3


def test_the_values_of_scales_count_and_not_how_they_are_kept():
    spec = spec_of("cache_int8")
    half = {i: scales(i, dtype=ml_dtypes.bfloat16) for i in range(2)}
    whole = {i: found.map(lambda a: a.astype("float32")) for i, found in half.items()}
    flat = {i: found.map(np.ravel) for i, found in whole.items()}
    prints = [Fingerprint.of(spec, model="m", scales=s) for s in (half, whole, flat)]
    assert len(set(prints)) == 1
    per_head = {i: scales(i, (HEADS,)) for i in range(2)}
    assert Fingerprint.of(spec, model="m", scales=per_head).granularities == ("head", "head")


def test_scales_that_a_layer_needs_must_be_there():
    with pytest.raises(MissingTensorError, match=r"scales\[3\] \(format cache_int4_zp\)"):
        Fingerprint.of(SPEC, model="m", scales={1: scales(1)})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": ""}, "a name of 1 to 256"),
        ({"model": "m" * 257}, "a name of 1 to 256"),
        ({"shard_rank": 2, "shard_size": 2}, "got rank 2 of 2"),
        ({"shard_rank": -1}, "got rank -1 of 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    with pytest.raises(SpecError, match=says):
        Fingerprint.of(SPEC, scales=STATIC, **{"model": "m", **arguments})


def test_the_largest_fingerprint_fits():
    spec = spec_of(["cache_int4_zp"] * 2048)
    bundle = scales(1, zp=True)
    found = Fingerprint.of(spec, model="m" * 256, scales=dict.fromkeys(range(2048), bundle))
    assert len(found.encode()) <= MAX_ENCODED
    assert Fingerprint.decode(found.encode()) == found
    with pytest.raises(SpecError, match="num_layers: expected at most 2048, got 2049"):
        Fingerprint.of(spec_of(["none"] * 2049), model="m")


def test_encoding_comes_back():
    assert Fingerprint.decode(BASE.encode()) == BASE
    odd = replace(BASE, model='µ\ud800"\\\n')
    assert Fingerprint.decode(odd.encode()) == odd


def edited(**changes):
    return json.dumps(
        {**json.loads(BASE.encode()), **changes}, sort_keys=True, separators=(",", ":")
    ).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no JSON"),
        (BASE.encode()[:-1], "no JSON"),
        (BASE.encode() + b" ", "not the canonical encoding"),
        (b"[" * 60_000, "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"9" * 60_000, "no JSON"),
        (b" " * (MAX_ENCODED + 1), "65537 bytes, more than 65536"),
        (b"[]", "other fields"),
        (b"{}", "other fields"),
        (edited(more=1), "other fields"),
        (edited(head_dim="16"), "a value that head_dim cannot have"),
        (edited(head_dim=-1), "a value that head_dim cannot have"),
        (edited(head_dim=True), "a value that head_dim cannot have"),
        (edited(head_dim=1.5), "a value that head_dim cannot have"),
        (edited(head_dim=2**31), "a value that head_dim cannot have"),
        (edited(formats="none"), "a value that formats cannot have"),
        (edited(formats=["n" * 25]), "a value that formats cannot have"),
        (edited(formats=[1]), "a value that formats cannot have"),
        (edited(formats=["n"] * 2049), "a value that formats cannot have"),
        (edited(model="m" * 257), "a value that model cannot have"),
        (edited(dtype=None), "a value that dtype cannot have"),
        (edited(scales_digest="00"), "a value that scales_digest cannot have"),
        (BASE.encode().replace(b'"model":"m"', b'"model":"n","model":"m"'), "not the canonical"),
    ],
)
def test_hostile_bytes_are_refused(data, says):
    with pytest.raises(MalformedError, match=f"^Fingerprint.decode: {says}"):
        Fingerprint.decode(data)


@given(
    st.binary(max_size=200)
    | st.builds(
        lambda at, byte: BASE.encode()[:at] + bytes([byte]) + BASE.encode()[at + 1 :],
        st.integers(0, len(BASE.encode()) - 1),
        st.integers(0, 255),
    )
)
def test_bytes_decode_to_what_they_encode_or_raise(data):
    try:
        found = Fingerprint.decode(data)
    except MalformedError:
        return
    assert found.encode() == data
