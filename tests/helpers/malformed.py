# SPDX-License-Identifier: Apache-2.0
"""Two sets of malformed calls: faults that metadata shows, and faults in values.

Both are made on the host from a legal call; a GPU test moves what it gets to a device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastkv import Rope
from helpers.calls import REQUIRED, WITH_CACHE
from helpers.on_gpu import host_call

WRONG_DTYPE = {"f": np.float64, "i": np.int64, "V": np.uint16, "u": np.int16}


def metadata_faults(op, fmt, make):
    """`(name, broken call)` of every fault that metadata shows; `make()` gives a legal call."""
    for name in REQUIRED[op]:
        call = make()
        call[name] = None
        if op == "rope_write_kv":
            call["out_k"] = call["out_v"] = call["cu_seqlens_k"] = None
        yield f"{name} is None", call
    for name, array in make().arrays().items():
        call = make()
        call[name] = array[None]
        yield f"{name} has an axis too many", call
        call = make()
        call[name] = np.zeros(array.shape, WRONG_DTYPE[array.dtype.kind])
        yield f"{name} of another dtype", call
        call = make()
        call[name] = np.concatenate([array, array[:1]])
        yield f"{name} one too long", call
    if op in WITH_CACHE:
        yield from _cache_faults(op, fmt, make)
    for name, value in (
        ("window", 0),
        ("soft_cap", -1.0),
        ("scale", float("nan")),
        ("norm_eps", -1),
    ):
        call = make()
        if name in call.arguments or (op, name) == ("rope_write_kv", "norm_eps"):
            call[name] = value
            yield f"{name} is {value}", call


def _cache_faults(op, fmt, make):
    for name in ("k", "v", "k_scale", "v_scale", "static"):
        call = make()
        here = call[f"cache.{name}"]
        call[f"cache.{name}"] = None if here is not None else call["cache.k"]
        yield f"cache.{name} is {'None' if here is not None else 'given'}", call
    for field in make()["cache"].quant.static_fields:
        call = make()
        call[f"cache.static.{field}"] = np.ones(3, np.float32)
        yield f"{field} of no known granularity", call
    call = make()
    call["cache.layer_id"] = 7
    yield "a layer outside the spec", call


# --- values -----------------------------------------------------------------------------------

CACHED, NEW, NUM_PAGES = (20, 3, 18), (2, 4, 1), 8
FAULTY = 1  # the request that the faults of one request are put into
_BIG = 2**31 - 1


@dataclass(frozen=True)
class ValueFault:
    """A fault in the values of a batch of three requests.

    Attributes:
        name: for people.
        ops: the ops that it reaches.
        argument: the argument at fault.
        change: an array of it to the faulty one.
        one: only request `FAULTY` has it; the others' rows and pages must be served as ever.
    """

    name: str
    ops: tuple[str, ...]
    argument: str
    change: Any
    one: bool = True

    def put_in(self, call):
        """The call with the fault."""
        given = call[self.argument]
        call[self.argument] = self.change(given.copy() if isinstance(given, np.ndarray) else given)
        return call


def value_call(op, fmt):
    """The legal call that value faults are put into; the same bytes each time."""
    call = host_call(op, fmt, cached=CACHED, new=NEW)
    if "cache" in call.arguments:
        cache = call["cache"]
        assert len(cache.k) == NUM_PAGES
        for name in ("k_scale", "v_scale"):  # no NaN: rows are compared
            if getattr(cache, name) is not None:
                getattr(cache, name)[...] = 0.01
        if cache.k.dtype.name == "float8_e4m3fn":
            for tensor in (cache.k, cache.v):
                tensor.view(np.uint8)[...] &= 0xF7
    return call


_PAGED = ("rope_write_kv", "gather_kv", "paged_attention")
_QUERIES = ("rope_write_kv", "paged_attention", "masked_attention")
_SEGMENTS = ("gather_kv", "masked_attention")
_INTERVALS = ("paged_attention", "masked_attention")


def _at(index, value):
    def change(array):
        array[index] = value
        return array

    return change


VALUE_FAULTS = (
    *[
        ValueFault(f"page {page}", _PAGED, "block_table", _at((FAULTY, 0), page))
        for page in (10**6, _BIG, -2, -(2**31))
    ],
    ValueFault("page N", _PAGED, "block_table", _at((FAULTY, 0), NUM_PAGES)),
    *[
        ValueFault(f"length {length}", _PAGED, "cache_seqlens", _at(FAULTY, length))
        for length in (10**4, _BIG, _BIG - 2, -1, -(2**31))
    ],
    ValueFault("decreasing rows", _QUERIES, "cu_seqlens_q", _at(2, 1), one=False),
    ValueFault("rows past the batch", _QUERIES, "cu_seqlens_q", _at(3, 1000), one=False),
    ValueFault("negative rows", _QUERIES, "cu_seqlens_q", _at(0, -3), one=False),
    ValueFault("huge rows", _QUERIES, "cu_seqlens_q", _at(3, _BIG), one=False),
    ValueFault("decreasing segments", _SEGMENTS, "cu_seqlens_k", _at(2, 1), one=False),
    ValueFault("segments past the rows", _SEGMENTS, "cu_seqlens_k", _at(3, 10**6), one=False),
    ValueFault("negative segments", _SEGMENTS, "cu_seqlens_k", _at(0, -5), one=False),
    ValueFault(
        "short tables",
        ("rope_write_kv",),
        "rope",
        lambda rope: Rope(rope.cos[:8], rope.sin[:8]),
        one=False,
    ),
    ValueFault("interval from behind its end", _INTERVALS, "mask_offsets", _at(2, (9, 4))),
    ValueFault("interval outside", _INTERVALS, "mask_offsets", _at(2, (-4, 10**6))),
    *[
        ValueFault(f"page {page} in {name}", ("copy_pages",), name, _at(FAULTY, page))
        for page in (10**6, _BIG, -2, -(2**31))
        for name in ("src", "dst")
    ],
)
