# SPDX-License-Identifier: Apache-2.0
"""What a layer and a batch ask for, and what is looked at before the first write."""

import pytest

from fastkv.backends import FEATURES, LayerOptions, get_backend
from helpers.recording import RecordingOps
from helpers.sentinels import Sentinel, Sliceable, bare_layer, neighboured_spec, sentinel_meta

QKV = Sliceable("qkv", 40, 320)
OFFSETS, SINKS = Sentinel("mask_offsets"), Sentinel("sinks")
SPEC = neighboured_spec("cache_int8")


@pytest.mark.parametrize(
    ("options", "batch", "wanted"),
    [
        ({}, {}, set()),
        ({"window": 3}, {}, {"window"}),
        ({"soft_cap": 0.5}, {}, {"soft_cap"}),
        ({"sinks": SINKS}, {}, {"sinks"}),
        ({}, {"mask_offsets": OFFSETS, "num_decode": 0}, {"mask_offsets_on_prefill"}),
        ({}, {"mask_offsets": OFFSETS, "num_decode": 5}, {"mask_offsets_on_decode"}),
        (
            {"window": 1, "soft_cap": 2.0, "sinks": SINKS, "scale": 0.3, "causal": False},
            {"mask_offsets": OFFSETS, "num_decode": 1},
            set(FEATURES),
        ),
    ],
)
def test_features_that_a_layer_and_a_batch_need(options, batch, wanted):
    assert LayerOptions(**options).features(sentinel_meta(SPEC, **batch)) == wanted


class CheckingOps(RecordingOps):
    """Also records what is checked before the first op."""

    def check_step(self, op, qkv, cache, **arguments):
        assert self.calls == [], "nothing was called before"
        self.checked = op, qkv, cache, arguments


def checked(backend, *, layer=None, **batch):
    """What `check_step` was given, None where it was not asked; and the batch."""
    ops, meta = CheckingOps(), sentinel_meta(SPEC, requests=5, **batch)
    ops.checked = None
    layer = bare_layer("cache_int8", 1, **(layer or {}))
    get_backend(SPEC, name=backend, ops=ops).forward_mixed(QKV, layer, meta)
    return ops.checked, meta


@pytest.mark.parametrize("backend", ["append", "flash", "flash_mask"])
@pytest.mark.parametrize("num_decode", [0, 2, 5])
@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("offsets", [None, OFFSETS])
def test_what_is_checked_before_the_first_write(backend, num_decode, sinks, offsets):
    gathers = backend != "append" and num_decode < 5
    if backend == "flash" and gathers:
        offsets = None  # refused there
    batch = {"num_decode": num_decode, "mask_offsets": offsets}
    found, meta = checked(backend, layer={"sinks": sinks}, **batch)
    if sinks is None and offsets is None and not gathers:
        assert found is None  # rope_write_kv checks all that there is
        return
    op, qkv, cache, arguments = found
    assert (op, qkv) == (f"{backend}.forward_mixed", QKV)
    assert (cache.layer_id, cache.k) == (1, meta.caches[SPEC.first_index(1)])
    assert arguments == {
        "cu_seqlens_q": meta.cu_seqlens_q,
        "cache_seqlens": meta.cache_seqlens,
        "block_table": meta.block_table,
        "sinks": sinks,
        "mask_offsets": offsets,
        "cu_seqlens_k": meta.cu_seqlens_k if gathers else None,
        "num_decode": num_decode,
    }
