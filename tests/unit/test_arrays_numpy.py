# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays, what is no tensor, and that no library is loaded before it is needed.

PyTorch's and Paddle's tensors have the same tests in tests/integration.
"""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from fastkv import arrays, ops
from fastkv.errors import (
    ContractError,
    DtypeError,
    PlacementError,
    ReadOnlyError,
    UnknownNameError,
)
from helpers.array_suite import ArraySuite, Tensors
from helpers.batches import make_batch, snapshot, tensors_of


class NumpyTensors(Tensors):
    name = "numpy"

    def make(self, host):
        return host.copy()

    def address(self, tensor):
        return tensor.ctypes.data

    def bits(self, tensor):
        return np.array(tensor, order="C").view(f"u{tensor.itemsize}")

    def has_dtype(self, tensor, name):
        return tensor.dtype.name == name

    def strides(self, tensor):
        return tuple(stride // tensor.itemsize for stride in tensor.strides)

    def overwrite(self, tensor, bits):
        tensor.view(bits.dtype)[...] = bits


class TestNumpy(ArraySuite):
    tensors = NumpyTensors()


def test_ordinary_array_is_its_own_view():
    array = np.zeros((3, 4), np.float32)
    assert arrays.to_host(array) is array
    assert arrays.from_host(array, "numpy") is array


@pytest.mark.parametrize("kind", [np.matrix, np.memmap, np.recarray])
def test_subclass_is_viewed_as_a_plain_array(tmp_path, kind):
    if kind is np.memmap:
        array = np.memmap(tmp_path / "f", np.int32, "w+", shape=(2, 3))
    else:
        array = np.arange(6, dtype=np.int32).reshape(2, 3).view(kind)
    view = arrays.to_host(array)
    assert type(view) is np.ndarray
    assert view.ctypes.data == array.ctypes.data
    assert view[0].shape == (3,)


def test_read_only_arrays_are_described_so():
    array = np.zeros(3, np.int32)
    assert arrays.describe(array).writeable
    array.flags.writeable = False
    assert not arrays.describe(array).writeable
    assert not arrays.describe(np.broadcast_to(np.float32(1), (3, 4))).writeable


def test_read_only_memory_is_not_shared():
    array = np.zeros(3, np.int32)
    array.flags.writeable = False
    with pytest.raises(ReadOnlyError, match="from_host: array"):
        arrays.from_host(array, "numpy")
    assert arrays.convert(array, "numpy").flags.writeable


@pytest.mark.parametrize("fmt", ["none", "block_wise_fp8"])
def test_read_only_cache_is_not_written(fmt):
    batch = make_batch(np.random.default_rng(0), fmt)
    for name, tensor in tensors_of(batch.cache).items():
        before = snapshot(batch.cache)
        tensor.flags.writeable = False
        with pytest.raises(ReadOnlyError) as caught:
            ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta)
        assert caught.value.argument == f"cache.{name}"
        tensor.flags.writeable = True
        after = snapshot(batch.cache)
        assert all((after[key] == before[key]).all() for key in before)


# What is no tensor


class Lookalike:
    """Has what a tensor has, and is none."""

    shape = (3,)
    dtype = np.dtype(np.float32)
    device = "cpu"


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        (1,),
        3,
        2.5,
        None,
        object(),
        "tensor",
        b"bytes",
        memoryview(b"b"),
        range(3),
        Lookalike(),
        SimpleNamespace(shape=(), dtype="float32"),
        np.float32,
        np.dtype(np.float32),
        np.zeros,
        np.random.default_rng(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_tensor_is_refused_by_name(value):
    for call in (
        lambda: arrays.describe(value, "some_op", "some_argument"),
        lambda: arrays.to_host(value),
        lambda: arrays.convert(value, "numpy"),
    ):
        with pytest.raises(DtypeError) as caught:
            call()
        error = caught.value
        assert isinstance(error, TypeError)
        assert error.expected == "a tensor of NumPy, PyTorch, Paddle or CuPy"
        assert error.got == f"{type(value).__module__}.{type(value).__qualname__}"
    with pytest.raises(DtypeError, match=r"^some_op: some_argument: expected a tensor"):
        arrays.describe(value, "some_op", "some_argument")


@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cache_seqlens", "block_table"])
def test_lists_are_refused_by_the_ops(argument):
    batch = make_batch(np.random.default_rng(1))
    with pytest.raises(DtypeError) as caught:
        ops.rope_write_kv(
            batch.qkv, batch.cache, **(batch.meta | {argument: getattr(batch, argument).tolist()})
        )
    assert (caught.value.argument, caught.value.got) == (argument, "builtins.list")


# Byte order


@pytest.mark.parametrize("dtype", [">f4", ">f2", ">i4"])
def test_foreign_byte_order_is_refused(dtype):
    array = np.arange(4).astype(dtype)
    assert arrays.describe(array).dtype == dtype
    for call in (
        lambda: arrays.to_host(array),
        lambda: arrays.convert(array, "numpy"),
        lambda: arrays.from_host(array, "numpy"),
    ):
        with pytest.raises(DtypeError) as caught:
            call()
        assert caught.value.got == dtype


@pytest.mark.parametrize("argument", ["qkv", "cache_seqlens", "block_table"])
def test_foreign_byte_order_is_refused_by_the_ops(argument):
    batch = make_batch(np.random.default_rng(2))
    swapped = getattr(batch, argument)
    swapped = swapped.astype(swapped.dtype.newbyteorder(">"))
    before = snapshot(batch.cache)
    given = {"qkv": batch.qkv} | batch.meta | {argument: swapped}
    with pytest.raises(DtypeError) as caught:
        ops.rope_write_kv(given.pop("qkv"), batch.cache, **given)
    assert (caught.value.argument, caught.value.got) == (argument, swapped.dtype.str)
    after = snapshot(batch.cache)
    assert all((after[key] == before[key]).all() for key in before)


# Names


def test_numpy_dtypes_by_name():
    assert arrays.numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    assert arrays.numpy_dtype("float8_e4m3fn") == ml_dtypes.float8_e4m3fn
    for name in ("float32", "float16", "int8", "uint8", "int32", "int64", "bool"):
        assert arrays.numpy_dtype(name) == np.dtype(name)


@pytest.mark.parametrize("name", ["qint8", "float7", ""])
def test_dtype_that_numpy_lacks_is_named(name):
    with pytest.raises(DtypeError, match=f"got {name}"):
        arrays.numpy_dtype(name)


@pytest.mark.parametrize("library", ["jax", "Torch", "", "tensorflow"])
def test_unknown_library_is_refused_with_the_list(library):
    array = np.zeros(3, np.float32)
    for call in (
        lambda: arrays.zeros(library, (3,), "float32"),
        lambda: arrays.convert(array, library),
        lambda: arrays.from_host(array, library),
    ):
        with pytest.raises(UnknownNameError, match="expected one of numpy, torch, paddle, cupy"):
            call()


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "gpu", "meta", ""])
def test_numpy_lives_on_the_cpu(device):
    array = np.zeros(3, np.float32)
    for call in (
        lambda: arrays.zeros("numpy", (3,), "float32", device),
        lambda: arrays.convert(array, "numpy", device),
    ):
        with pytest.raises(PlacementError) as caught:
            call()
        assert isinstance(caught.value, ContractError)
        assert (caught.value.expected, caught.value.got) == ("cpu for numpy", device)


# Which libraries are loaded

HIDE = "import sys\nfor name in ('torch', 'paddle', 'cupy'):\n    sys.modules[name] = None\n"


def test_numpy_arrays_load_no_other_library(run_python):
    done = run_python(
        "import json, sys, numpy as np\n"
        "from fastkv import arrays\n"
        "arrays.to_host(np.zeros(3)); arrays.describe(np.zeros(3))\n"
        "print(json.dumps([n for n in ('torch', 'paddle', 'cupy') if n in sys.modules]))"
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("library", "install"),
    [
        ("torch", "pip install 'fastkv[torch]'"),
        ("paddle", "pip install 'fastkv[paddle]'"),
        ("cupy", "pip install 'fastkv[cuda12]' (or cuda13)"),
    ],
)
def test_absent_library_is_asked_for_by_the_line_that_installs_it(run_python, library, install):
    done = run_python(
        f"{HIDE}"
        "from fastkv import CacheSpec\n"
        "from fastkv.errors import MissingDependencyError\n"
        "try:\n"
        f"    CacheSpec(1, 1, 8, 4).allocate(2, {library!r})\n"
        "except MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    assert (
        done.stdout.strip()
        == f"A {library} tensor needs {library}, which is not installed: {install}"
    )
