# SPDX-License-Identifier: Apache-2.0
"""What `masked_attention` hands to its kernel, and what it refuses before; no GPU is needed."""

import struct
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest

from fastkv.arrays import numpy_dtype
from fastkv.contracts import calls
from fastkv.errors import UnsupportedError
from fastkv.ops.cuda import faults, jit, listing, masked_attention
from fastkv.ops.cuda.masked_shape import Shape, most_tiles

POINTERS = ("q", "out", "lse", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "mask_offsets", "sinks")
STRIDES = [f"{name}_{axis}" for name in ("q", "out", "k", "v") for axis in ("token", "head")]
COUNTS = ("tokens", "keys", "requests", "kv_heads", "group", "fresh")
FIELDS = [*POINTERS, "faults", *STRIDES, *COUNTS, "causal", "window", "scale", "soft_cap"]
LAYOUT = "=10Q8q8i2f"
RESIDENT = 264


def aligned(shape, dtype, at=0):
    """Zeros whose address is `at` past a multiple of 64 bytes."""
    size = int(np.prod(shape)) * numpy_dtype(dtype).itemsize
    room = np.zeros(size + 128, np.uint8)
    first = -room.ctypes.data % 64 + at
    return room[first : first + size].view(numpy_dtype(dtype)).reshape(shape)


def tensors(dtype="bfloat16", *, tokens=300, keys=500, heads=2, group=3, dim=128, requests=2):
    """The tensors of a call that is served, each with strides of its own."""
    width = dim + 16
    kv = aligned((keys, 2 * heads + 1, width), dtype)
    return {
        "q": aligned((tokens, heads * group, dim), dtype),
        "k": kv[:, :heads, :dim],
        "v": aligned((keys, heads, dim + 8), dtype)[..., :dim],
        "cu_seqlens_q": aligned(requests + 1, "int32"),
        "cu_seqlens_k": aligned(requests + 1, "int32"),
        "mask_offsets": aligned((tokens, 2), "int32"),
        "sinks": aligned(heads * group, "float32"),
        "out": aligned((tokens, heads * group + 1, dim), dtype)[:, 1:],
        "lse": aligned((tokens, heads * group), "float32"),
    }


class Kernel:
    """Packs what it is launched with, as the real one does."""

    index, resident_blocks = 0, RESIDENT

    def __init__(self, what, index, fields, threads, shared):
        self.what, self.fields, self.threads, self.shared = what, fields, threads, shared
        self.launched = []

    def launch(self, stream, grid, *values):
        packed = struct.Struct(f"@{''.join(self.fields)}").pack(*values)
        values = struct.unpack(LAYOUT, packed)
        self.launched.append((stream, grid, dict(zip(FIELDS, values, strict=True))))


@pytest.fixture
def launch(monkeypatch):
    """Runs the launcher on host tensors; the kernel and the library's calls are stand-ins."""
    library = SimpleNamespace(
        strides=lambda x: tuple(stride // x.itemsize for stride in x.strides),
        pointer=lambda x: x.ctypes.data,
        stream=lambda index: 7,
    )
    monkeypatch.setattr("fastkv.arrays.on_device", lambda name: library)
    monkeypatch.setattr(faults, "word", lambda index, stream: 0)
    made = []

    def kernel(*args):
        made.append(Kernel(*args))
        return made[-1]

    monkeypatch.setattr(masked_attention, "kernel", kernel)

    def run(given, sm=90, out=None, **options):
        facts = SimpleNamespace(sm=sm)
        monkeypatch.setattr(jit, "device_facts", lambda _: facts)
        x = dict(given)
        made_out, lse = x.pop("out"), x.pop("lse")
        asked = {"scale": None, "window": None, "soft_cap": None} | options
        causal = asked.pop("causal", True)
        wanted = {**x, **asked, "out": out}
        contract = calls.masked_attention.__wrapped__  # what is remembered would change below
        checker = contract(*(wanted[name] for name in signature(contract).parameters))
        checker.first = checker.first._replace(device="cuda:0")
        data = [x.pop(name) for name in "qkv"]
        results = {"out": made_out if out is None else out, "lse": lse}
        masked_attention.masked_attention(checker, *data, **x, **asked, causal=causal, **results)
        (launched,) = made[-1].launched
        return made[-1], *launched

    return run


def test_the_struct_holds_every_argument(launch):
    x = tensors()
    options = {"window": 40, "soft_cap": 2.0, "scale": 0.25, "causal": False}
    kernel, stream, grid, found = launch(x, out=x["out"], **options)
    assert (stream, grid) == (7, min(RESIDENT, (300 // 128 + 2) * 6))
    assert [found[name] for name in POINTERS] == [x[name].ctypes.data for name in POINTERS]
    strides = [found[name] for name in STRIDES]
    assert strides == [768, 128, 896, 128, 5 * 144, 144, 2 * 136, 136]
    assert [found[name] for name in COUNTS] == [300, 500, 2, 2, 3, 0]
    assert (found["causal"], found["window"]) == (0, 40)
    assert (found["scale"], found["soft_cap"], found["faults"]) == (0.25, 2.0, 0)
    assert dict(kernel.what.defines)["FASTKV_Q"] == "Bf16"


def test_what_is_not_given_has_a_value_that_the_kernel_knows(launch):
    x = tensors("float16", dim=64) | {"mask_offsets": None, "sinks": None, "lse": None}
    x["out"] = aligned(x["q"].shape, "float16")
    kernel, _, _, found = launch(x)
    assert [found[name] for name in ("lse", "mask_offsets", "sinks")] == [0, 0, 0]
    assert (found["causal"], found["window"], found["fresh"]) == (1, 0x3FFFFFFF, 1)
    assert (found["scale"], found["soft_cap"]) == (0.125, 0.0)
    assert (found["out_token"], found["out_head"]) == (6 * 64, 64)
    assert dict(kernel.what.defines)["FASTKV_Q"] == "Fp16"


@pytest.mark.parametrize(
    ("window", "packed"), [(1, 1), (0x3FFFFFFF, 0x3FFFFFFF), (2**40, 2**30 - 1)]
)
def test_a_window_is_capped_where_positions_cannot_reach(launch, window, packed):
    assert launch(tensors(), window=window)[3]["window"] == packed


@pytest.mark.parametrize("sm", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_kernel_is_that_of_the_device(launch, sm, dim):
    kernel, *_ = launch(tensors(dim=dim), sm)
    shape = Shape.of(dim, jit.arch_of(sm))
    assert (kernel.threads, kernel.shared) == (shape.threads, shape.shared)
    defines = dict(kernel.what.defines)
    assert defines["FASTKV_D"] == f"{dim}"
    assert defines["FASTKV_WARPGROUPS"] == f"{int(sm == 90)}"
    assert defines["FASTKV_SHARED_BYTES"] == f"{shape.shared}"


@pytest.mark.parametrize(
    ("arch", "dim", "keys", "threads", "shared"),
    [
        ("sm_90a", 64, 128, 384, 1024 + 128 * 64 * 2 + 4 * 128 * 64 * 2 + 256),
        ("sm_90a", 96, 128, 384, 1024 + 128 * 128 * 2 + 4 * 128 * 128 * 2 + 256),
        ("sm_90a", 128, 128, 384, 165_120),
        ("sm_90a", 256, 64, 384, 197_888),
        ("sm_80", 64, 64, 128, 32_768),
        ("sm_120", 96, 64, 128, 65_536),
        ("sm_100", 128, 64, 128, 65_536),
        ("sm_89", 256, 32, 256, 98_304),
    ],
)
def test_shapes(arch, dim, keys, threads, shared):
    assert Shape.of(dim, arch) == Shape(int(arch == "sm_90a"), keys, threads, shared)


def test_a_batch_has_no_more_tiles_than_the_grid_is_sized_for():
    rng = np.random.default_rng(3)
    for _ in range(200):
        lengths = rng.integers(0, 400, rng.integers(1, 9))
        tiles = -(-lengths // 128).sum() * 5
        assert tiles <= most_tiles(int(lengths.sum()), len(lengths), 5)
    assert most_tiles(3, 3, 5) == 15


@pytest.mark.parametrize(
    ("tokens", "requests", "grid"), [(1, 1, 6), (5_000, 1, 240), (9_000, 8, RESIDENT), (1, 0, 1)]
)
def test_the_grid_is_what_is_resident_or_less(launch, tokens, requests, grid):
    assert launch(tensors(tokens=tokens, requests=requests))[2] == grid


def test_every_example_is_for_some_architecture_and_all_are_covered():
    examples = masked_attention.specializations()
    assert len(set(examples)) == 8
    built = {
        arch: [dict(what.defines) for what in examples if listing.is_for(what, arch)]
        for arch in listing.ARCHITECTURES
    }
    kinds = {arch: {found["FASTKV_WARPGROUPS"] for found in built[arch]} for arch in built}
    assert kinds.pop("sm_90a") == {"0", "1"}
    assert list(kinds.values()) == [{"0"}] * 4
    for arch, found in built.items():
        assert {defines["FASTKV_D"] for defines in found} == {"64", "96", "128", "256"}, arch
    assert {dict(what.defines)["FASTKV_PARAMS_BYTES"] for what in examples} == {"184"}
    assert struct.calcsize(LAYOUT) == 184


# --- refusals ---------------------------------------------------------------------------------


def wide(x, name, pad):
    """The tensor as a view into one whose rows are `pad` elements longer."""
    shape = x[name].shape
    room = aligned((*shape[:2], shape[2] + pad), x[name].dtype.name)
    return {name: room[..., : shape[2]]}


def moved(x, name, by):
    return {name: aligned(x[name].shape, x[name].dtype.name, by)}


def transposed(x, name):
    shape = x[name].shape
    return {name: aligned(shape[::-1], x[name].dtype.name).transpose(2, 1, 0)}


def scattered(x, name):
    return {name: np.repeat(x[name], 2, axis=0)[::2]}


def float32(x, *names):
    return {name: x[name].astype(np.float32) for name in names}


def narrow(x, name):
    return {name: x[name].astype(np.float16)}


SIXTEEN = "strides of a multiple of 16 bytes on a GPU"
DENSE = "a last axis of stride 1 on a GPU"
REFUSED = {
    "float32": (lambda x: float32(x, "q", "k", "v"), "q", "bfloat16 or float16 on a GPU"),
    "float32 k": (lambda x: float32(x, "k", "v"), "k", "q's dtype, bfloat16, on a GPU"),
    "fp16 k": (lambda x: narrow(x, "k") | narrow(x, "v"), "k", "q's dtype, bfloat16, on a GPU"),
    "odd rows of q": (lambda x: wide(x, "q", 4), "q", SIXTEEN),
    "odd rows of k": (lambda x: wide(x, "k", 4), "k", SIXTEEN),
    "odd rows of v": (lambda x: wide(x, "v", 4), "v", SIXTEEN),
    "odd rows of out": (lambda x: wide(x, "out", 4), "out", SIXTEEN),
    "axes of q": (lambda x: transposed(x, "q"), "q", DENSE),
    "axes of k": (lambda x: transposed(x, "k"), "k", DENSE),
    "axes of v": (lambda x: transposed(x, "v"), "v", DENSE),
    "axes of out": (lambda x: transposed(x, "out"), "out", DENSE),
    **{
        f"address of {name}": (
            lambda x, name=name: moved(x, name, 8),
            name,
            "memory aligned to 16 bytes on a GPU",
        )
        for name in ("q", "out", "k", "v")
    },
    "address of intervals": (
        lambda x: moved(x, "mask_offsets", 4),
        "mask_offsets",
        "memory aligned to 8 bytes on a GPU",
    ),
    **{
        f"strided {name}": (
            lambda x, name=name: scattered(x, name),
            name,
            "a contiguous tensor on a GPU",
        )
        for name in ("cu_seqlens_q", "cu_seqlens_k", "mask_offsets", "sinks")
    },
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_does_not_take_is_refused_by_name(launch, case):
    change, argument, expected = case
    x = tensors()
    x |= {"out": aligned(x["q"].shape, "bfloat16")}
    x |= change(x)
    if x["q"].dtype != x["out"].dtype:
        x["out"] = x["out"].astype(x["q"].dtype)
    with pytest.raises(UnsupportedError) as caught:
        launch(x, out=x["out"])
    error = caught.value
    assert (error.op, error.argument, error.expected) == ("masked_attention", argument, expected)


@pytest.mark.parametrize("dim", [32, 80, 192, 512])
def test_other_head_dims_are_refused(launch, dim):
    with pytest.raises(UnsupportedError) as caught:
        launch(tensors(dim=dim))
    assert (caught.value.argument, caught.value.got) == ("head_dim", f"{dim}")
    assert caught.value.hint.startswith(f"The CUDA kernels: head dim {dim} is none of 64, 96, 128")


def test_an_older_device_is_refused(launch):
    with pytest.raises(UnsupportedError, match="needs sm_80 or newer"):
        launch(tensors(), 75)


@pytest.mark.parametrize("group", [1, 7, 32])
def test_every_number_of_query_heads_is_served(launch, group):
    assert launch(tensors(group=group))[3]["group"] == group
