# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for tensors: policy may move them and ask the batch's for shapes, nothing more."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fastkv import BatchMeta, CacheSpec, Rope

#: What each format keeps in the flat list, written down again from the specification.
TENSORS = {
    "none": ("k", "v"),
    "cache_int8": ("k", "v"),
    "cache_fp8": ("k", "v"),
    "cache_int4_zp": ("k", "v"),
    "block_wise_fp8": ("k", "v", "k_scale", "v_scale"),
}
SCALES = {
    "cache_k_scale": "k_quant",
    "cache_k_out_scale": "k_dequant",
    "cache_v_scale": "v_quant",
    "cache_v_out_scale": "v_dequant",
}
ZERO_POINTS = {"cache_k_zp": "k_zp", "cache_v_zp": "v_zp"}
#: The layer's attributes that each format requires, and the field of the bundle that each becomes.
STATIC = {
    "none": {},
    "cache_int8": SCALES,
    "cache_fp8": SCALES,
    "cache_int4_zp": SCALES | ZERO_POINTS,
    "block_wise_fp8": {},
}
FORMATS = tuple(TENSORS)


class Sentinel:
    """Stands for a tensor. Whoever looks inside fails the test."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _touched(self, *_: object) -> Any:
        raise AssertionError(f"somebody looked inside {self.name}")

    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __setitem__ = _touched
    __int__ = __float__ = __index__ = __array__ = __lt__ = __le__ = __gt__ = __ge__ = _touched
    __add__ = __sub__ = __mul__ = __truediv__ = _touched


@dataclass(frozen=True)
class Part:
    """Entries `start .. stop` of a sentinel's first dimension."""

    whole: Sentinel
    start: int
    stop: int


class Sliceable(Sentinel):
    """A tensor of the batch: has a shape, and slices of it are `Part`s."""

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__(name)
        self.shape = shape

    def __getitem__(self, which: slice) -> Part:
        assert isinstance(which, slice), f"{self.name} was indexed with {which!r}"
        start, stop, step = which.indices(self.shape[0])
        assert step == 1, f"{self.name} was sliced with a step"
        return Part(self, start, stop)


def flat_list(spec):
    """A flat cache list of plain objects: nothing but identity to go by."""
    return [object() for _ in range(spec.num_tensors)]


def first_index(formats, layer_id):
    """The sum of the tensors of the layers before."""
    return sum(len(TENSORS[name]) for name in formats[:layer_id])


def bare_layer(fmt, layer_id=0, **attributes):
    """A layer with its format, and its static tensors as sentinels."""
    given = {name: Sentinel(name) for name in STATIC[fmt]}
    if fmt != "none":
        given["cache_quant_type_str"] = fmt
    return SimpleNamespace(layer_id=layer_id, **(given | attributes))


def sentinel_meta(spec, *, requests=5, num_decode=2, **changes):
    """A batch of sentinels."""
    values = {
        "caches": flat_list(spec),
        "spec": spec,
        "cu_seqlens_q": Sliceable("cu_seqlens_q", requests + 1),
        "cache_seqlens": Sliceable("cache_seqlens", requests),
        "block_table": Sliceable("block_table", requests, 7),
        "cu_seqlens_k": Sliceable("cu_seqlens_k", requests + 1),
        "total_k": 31,
        "num_decode": num_decode,
        "rope": Rope(Sentinel("rope.cos"), Sentinel("rope.sin")),
    }
    return BatchMeta(**(values | changes))


def neighboured_spec(fmt):
    """Layer 1 of three is in the format; its neighbours are in others."""
    return CacheSpec(3, 2, 16, 4, ["block_wise_fp8", fmt, "cache_int8"])
