# SPDX-License-Identifier: Apache-2.0
"""PyTorch tensors on the CPU."""

from contextlib import nullcontext
from functools import partial
from types import FunctionType

import numpy as np
import pytest
import torch

from fastkv import CacheSpec, LayerCache, arrays, ops
from fastkv.errors import DtypeError, FastKVError, PlacementError, ReadOnlyError, UnsupportedError
from helpers.array_suite import OPS, ForeignArraySuite, Tensors, call, calls, map_arrays
from helpers.batches import make_batch
from helpers.compare import assert_same_bits


class TorchTensors(Tensors):
    name = "torch"

    def make(self, host):
        raw = torch.from_numpy(
            np.array(host, order="C").reshape(host.shape).view(f"u{host.itemsize}")
        )
        return raw.view(getattr(torch, host.dtype.name)).clone()

    def address(self, tensor):
        return tensor.data_ptr()

    def bits(self, tensor):
        dense = tensor.detach().contiguous()
        return dense.view(getattr(torch, f"uint{8 * dense.element_size()}")).numpy().copy()

    def has_dtype(self, tensor, name):
        return tensor.dtype is getattr(torch, name)

    def strides(self, tensor):
        return tensor.stride()

    def overwrite(self, tensor, bits):
        tensor.view(torch.uint8).copy_(torch.from_numpy(bits.view(np.uint8)))


class TestTorch(ForeignArraySuite):
    tensors = TorchTensors()


TENSORS = TestTorch.tensors


# Tensors that are more than memory


def test_parameter_is_viewed_and_written():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    view = arrays.to_host(parameter)
    assert view.ctypes.data == parameter.data_ptr()
    view[1] = 7
    assert parameter.tolist() == [1, 7, 3]
    assert arrays.describe(parameter).dtype == "float32"


def test_op_takes_parameters_and_tensors_of_a_graph():
    rng = np.random.default_rng(0)
    batch = make_batch(rng)
    weight = rng.standard_normal(64).astype(np.float32)
    want = ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta, q_norm_weight=weight)
    given = TENSORS.of({"cache": batch.cache, **batch.meta})
    qkv = torch.nn.Parameter(torch.from_numpy(batch.qkv)) * 1
    assert qkv.requires_grad
    got = ops.rope_write_kv(
        qkv, given.pop("cache"), **given, q_norm_weight=torch.nn.Parameter(torch.from_numpy(weight))
    )
    assert not got.requires_grad
    assert_same_bits(TENSORS.bits(got), want)


def test_inference_tensors_and_subclasses_are_tensors():
    class Named(torch.Tensor):
        pass

    with torch.inference_mode():
        inference = torch.arange(3.0)
        assert arrays.to_host(inference).ctypes.data == inference.data_ptr()
    named = torch.arange(3.0).as_subclass(Named)
    assert arrays.describe(named) == ("torch", "cpu", "float32", (3,), True)
    assert arrays.to_host(named).ctypes.data == named.data_ptr()


def test_expanded_tensor_is_viewed_with_its_strides():
    tensor = torch.arange(3.0).expand(4, 3)
    view = arrays.to_host(tensor)
    assert view.strides == (0, 4)
    np.testing.assert_array_equal(view, [[0, 1, 2]] * 4)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64, torch.uint16])
def test_other_dtypes_are_viewed_under_their_names(dtype):
    tensor = torch.ones(3).to(dtype)
    view = arrays.to_host(tensor)
    assert view.dtype.name == str(dtype).removeprefix("torch.")
    assert arrays.describe(tensor).dtype == view.dtype.name


def test_bytes_of_dlpack_between_torch_and_numpy_are_the_same_memory():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert np.from_dlpack(tensor).ctypes.data == arrays.to_host(tensor).ctypes.data


# What is no memory with strides

ODD = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("kind", ODD)
def test_tensor_without_strides_is_refused(kind):
    for take, op in (
        (lambda tensor: arrays.describe(tensor, "some_op", "some_argument"), "some_op"),
        (arrays.to_host, "to_host"),
        (lambda tensor: arrays.convert(tensor, "numpy"), "to_host"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            take(ODD[kind]())
        assert caught.value.op == op
        assert caught.value.expected == "a tensor whose elements lie at strides"
        assert caught.value.hint


def test_lazily_negated_values_are_taken_once_resolved():
    negated = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert negated.tolist() == arrays.to_host(negated.resolve_neg()).tolist() == [-2, 4]


def test_op_refuses_a_negated_input():
    batch = make_batch(np.random.default_rng(1))
    given = TENSORS.of({"cache": batch.cache, **batch.meta})
    before = TENSORS.bits(given["cache"].k)
    qkv = torch.complex(torch.zeros(batch.qkv.shape), torch.from_numpy(batch.qkv)).conj().imag
    cache = given.pop("cache")
    with pytest.raises(UnsupportedError) as caught:
        ops.rope_write_kv(qkv, cache, **given)
    assert (caught.value.op, caught.value.argument) == ("rope_write_kv", "qkv")
    assert_same_bits(TENSORS.bits(cache.k), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.complex64, torch.int64])
def test_op_names_the_dtype_that_it_refuses(dtype):
    batch = make_batch(np.random.default_rng(2))
    given = TENSORS.of({"cache": batch.cache, **batch.meta})
    qkv = torch.zeros(batch.qkv.shape, dtype=dtype)
    with pytest.raises(DtypeError) as caught:
        ops.rope_write_kv(qkv, given.pop("cache"), **given)
    assert caught.value.got == str(dtype).removeprefix("torch.")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensor_is_refused_by_its_dtype():
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    assert arrays.describe(quantized).dtype == "qint8"
    with pytest.raises(DtypeError, match="qint8"):
        arrays.to_host(quantized)


# Other devices


def test_meta_tensor_has_no_memory():
    tensor = torch.zeros(3, device="meta")
    assert arrays.describe(tensor).device == "meta"
    with pytest.raises(PlacementError, match="expected a CPU tensor, got meta"):
        arrays.to_host(tensor)


@pytest.mark.parametrize("op", ["rope_write_kv", "gather_kv", "paged_attention", "copy_pages"])
def test_ops_refuse_the_meta_device(op):
    rng = np.random.default_rng(3)
    given = TENSORS.of(calls(make_batch(rng, "cache_int8"), rng)[op])
    given = map_arrays(given, lambda tensor: tensor.to("meta"), torch.Tensor)
    with pytest.raises(UnsupportedError) as caught:
        call(op, given)
    assert (caught.value.op, caught.value.argument, caught.value.got) == (op, "device", "meta")


class OnGpu(torch.Tensor):
    """A CPU tensor that says it lies on a GPU: all that a call may look at before it launches."""

    @property
    def device(self):
        return torch.device("cuda", 0)


@pytest.mark.parametrize("op", OPS)
def test_gpu_tensors_never_run_on_the_reference(op, mocker):
    host_views = mocker.spy(arrays, "to_host")
    rng = np.random.default_rng(4)
    batch = make_batch(rng, "block_wise_fp8").fill(rng)
    given = TENSORS.of(calls(batch, rng)[op])
    plain = given["cache"].k if "cache" in given else given[next(iter(given))]
    before = TENSORS.bits(plain)
    given = map_arrays(given, lambda tensor: tensor.as_subclass(OnGpu), torch.Tensor)
    host_views.reset_mock()
    # Neither CuPy nor a PyTorch with CUDA is here: the op looks for one of them, and for no other.
    with pytest.raises((FastKVError, AssertionError), match=r"cupy|CUDA"):
        call(op, given)
    assert host_views.call_count == 0
    assert_same_bits(TENSORS.bits(plain), before)


@pytest.mark.parametrize("name", ["cache_seqlens", "block_table", "cu_seqlens_k", "out_k", "out_v"])
def test_no_call_mixes_devices(name):
    rng = np.random.default_rng(5)
    given = TENSORS.of(calls(make_batch(rng), rng)["gather_kv"])
    given[name] = given[name].as_subclass(OnGpu)
    with pytest.raises(PlacementError) as caught:
        call("gather_kv", given)
    error = caught.value
    assert error.argument == name
    assert error.expected == "a torch tensor on cpu, as cache.k is"
    assert error.got == "a torch tensor on cuda:0"


def test_a_cache_whose_pages_share_memory_is_not_written():
    spec = CacheSpec(1, 2, 16, 8, "none", "float32")
    one_page = torch.randn(1, 2, 8, 16)
    before = one_page.clone()
    expanded = one_page.expand(4, 2, 8, 16)
    assert not arrays.describe(expanded).writeable
    ids = torch.tensor([1], dtype=torch.int32)
    with pytest.raises(ReadOnlyError, match=r"cache\.v") as caught:
        ops.copy_pages(LayerCache(spec, 0, torch.randn(4, 2, 8, 16), expanded), ids, ids + 1)
    assert caught.value.op == "copy_pages"
    assert torch.equal(one_page, before)
    # One page that is its own only row has nothing to share.
    assert arrays.describe(torch.zeros(1, 3).expand(1, 3)).writeable


# On a GPU: what needs none to be tested


def metadata(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_neg()


def likeness_samples():
    """Tensors that differ in one thing, or in none."""
    whole = torch.zeros(4, 6, dtype=torch.float16)
    yield from (whole, whole.clone(), torch.nn.Parameter(whole), whole.view(torch.int16))
    yield from (whole[:3], whole[:, :5], whole[:, ::2], whole.t(), whole.view(6, 4))
    yield from (whole.view(24), whole[None], whole[:0], whole.bfloat16(), whole.to("meta"))
    yield from (
        torch._neg_view(whole),
        torch.zeros(6, 4).t().half(),
        whole.as_strided((4, 6), (0, 1)),
    )
    yield from (
        torch.zeros(1, 6),
        torch.zeros(4, 6)[:1],
        torch.zeros(1, 6).as_strided((1, 6), (9, 1)),
    )
    yield from (torch.zeros(0, 6), torch.zeros(0, 5), torch.zeros(()), torch.zeros(1))


def test_likeness_is_true_of_no_two_metadata():
    samples = list(likeness_samples())
    first = torch.zeros(2, dtype=torch.int32)
    for one in samples:
        alike = arrays.likeness([first, one])
        assert alike(torch.ones(2, dtype=torch.int32), one) is True
        for other in samples:
            same = metadata(one) == metadata(other) and type(one) is type(other)
            assert alike(first, other) <= same, (metadata(one), metadata(other))
            if same and not one.requires_grad:
                assert alike(first, other) is True


def test_likeness_is_false_where_a_tensor_was_changed_in_place():
    changes = {
        "resize_": lambda t: t.resize_(4, 6),
        "t_": lambda t: t.t_(),
        "set_": lambda t: t.set_(torch.zeros(3, 6)),
        ".data": lambda t: setattr(t, "data", torch.zeros(6, 6, dtype=torch.float64)),
    }
    for name, change in changes.items():
        tensor = torch.zeros(6, 6)
        alike = arrays.likeness([tensor])
        assert alike(tensor), name
        change(tensor)
        assert not alike(tensor), name


def test_likeness_of_a_tensor_that_comes_twice():
    def pair():
        return torch.zeros(2, 3), torch.zeros(2)

    (a, b), (x, y) = pair(), pair()
    arrays.describe(a)
    alike = arrays.likeness([a, b, a, b])
    assert alike(a, b, a, b) is True
    assert alike(x, y, x, y) is True
    assert alike(x, y, x, b) is False
    assert alike(x, y, a, y) is False
    assert alike(b, y, b, y) is False
    assert alike(x, a, x, a) is False
    x.t_()
    assert alike(x, y, x, y) is False
    once = arrays.likeness([a, b, a.clone(), b.clone()])
    assert once(a, b, a, b) is False


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_merge_of_one_state_with_itself_is_found_without_a_key(monkeypatch):
    from fastkv.contracts import calls as contracts

    q, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    arrays.describe(q)
    first = contracts.merge_states(q, lse, q.clone(), lse.clone())
    assert contracts.merge_states(q, lse, q, lse) is first
    monkeypatch.delattr("fastkv.contracts.remember.signature")
    assert contracts.merge_states(q, lse, q, lse) is first
    assert contracts.merge_states(q.clone(), lse, q, lse.clone()) is first


def test_likeness_of_several_libraries_is_none():
    arrays.describe(np.zeros(1))
    assert arrays.likeness([torch.zeros(1), torch.zeros(2)]) is not None
    assert arrays.likeness([torch.zeros(1), np.zeros(1)]) is None
    assert arrays.likeness([np.zeros(1)]) is None


def guards(check):
    """A class like PyTorch's, with another test."""

    class Guards:
        def __init__(self, *tensors, dynamic_dims_sizes, dynamic_dims_strides):
            self.tensors = tensors

        def check(self, *others):
            return check(self.tensors, others)

    return Guards


def by_shape_alone(tensors, others):
    return [t.shape for t in tensors] == [t.shape for t in others]


def by_metadata_but_strides(tensors, others):
    return [(t.shape, t.dtype, t.device, t.layout) for t in tensors] == [
        (t.shape, t.dtype, t.device, t.layout) for t in others
    ]


def refuses(*_):
    raise RuntimeError("another meaning")


@pytest.mark.parametrize(
    "found",
    [
        None,
        object,
        guards(lambda *_: True),
        guards(lambda *_: False),
        guards(refuses),
        guards(by_shape_alone),
        guards(by_metadata_but_strides),
    ],
)
def test_guards_that_do_something_else_are_not_used(found, monkeypatch):
    from fastkv.arrays import torch as module

    assert module._tells_apart()
    monkeypatch.setattr(module, "_TensorGuards", found)
    assert not module._tells_apart()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CPU tensors that the contracts remember."""
    from fastkv.arrays import torch as module

    monkeypatch.setitem(module._on_gpu, torch.device("cpu"), True)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_layer_whose_tensor_was_changed_in_place_is_checked_anew():
    from fastkv.contracts import calls as contracts

    spec = CacheSpec(1, 2, 8, 4, "none", "float32")
    cache = LayerCache(spec, 0, *spec.allocate(3, "torch"))
    ids = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    first = contracts.copy_pages(cache, *ids)
    assert contracts.copy_pages(cache, *ids) is first
    assert contracts.copy_pages(cache, ids[0], ids[0]) is first
    cache.k.resize_(5, 2, 4, 8)
    cache.v.resize_(5, 2, 4, 8)
    second = contracts.copy_pages(cache, *ids)
    assert (first.sizes["N"], second.sizes["N"]) == (3, 5)
    cache.v.transpose_(1, 2)
    with pytest.raises(FastKVError, match=r"cache\.v"):
        contracts.copy_pages(cache, *ids)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 5), (4, 0, 3), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_what_is_made_on_a_gpu_is_dense(shape, dtype):
    from fastkv.arrays.torch import LIBRARY

    make = LIBRARY.on_device.maker(shape, dtype, 1)
    assert make.keywords["device"] == torch.device("cuda:1")
    made = make(device="cpu")
    assert metadata(made) == metadata(torch.empty(shape, dtype=getattr(torch, dtype)))
    assert make(device="cpu") is not made


@pytest.fixture
def on_a_current_device(monkeypatch):
    """The device of index 0 is the CPU; a list whose item is the current device's index."""
    from fastkv.arrays import torch as module

    current = [0]
    monkeypatch.setattr(module, "_current_device", lambda: current[0])
    monkeypatch.setattr(module, "_empty_here", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(module, "_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    module._makes_dense.cache_clear()
    yield current
    module._makes_dense.cache_clear()


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 5), (4, 0, 3), (1, 1)])
@pytest.mark.parametrize("current", [0, 1])
def test_what_is_made_on_the_current_device_is_dense(
    shape, current, on_a_current_device, monkeypatch
):
    from fastkv.arrays import torch as module

    general, asked = torch.empty_strided, []
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: asked.append(1) or general(*a, **k))
    make = module._maker(shape, "bfloat16", 0)
    on_a_current_device[0] = current
    made = make()
    assert metadata(made) == metadata(torch.empty(shape, dtype=torch.bfloat16))
    assert make() is not made
    assert len(asked) == (2 if current else 0)


@pytest.mark.parametrize(
    "found",
    [
        lambda shape, strides, dtype: torch.empty(shape, dtype=dtype, device="meta"),
        lambda shape, strides, dtype: torch.empty(shape[::-1], dtype=dtype),
        lambda shape, strides, dtype: torch.empty(shape[::-1], dtype=dtype).t(),
        lambda shape, strides, dtype: torch.empty(shape),
        lambda shape, strides, dtype: torch.empty(shape, dtype=dtype, requires_grad=True),
        lambda shape, strides: None,
        lambda shape, strides, dtype: None,
        refuses,
        None,
    ],
)
@pytest.mark.usefixtures("on_a_current_device")
def test_an_allocation_that_does_something_else_is_not_used(found, monkeypatch):
    from fastkv.arrays import torch as module

    assert isinstance(module._maker((2,), "float32", 0), FunctionType)
    module._makes_dense.cache_clear()
    monkeypatch.setattr(module, "_empty_here", found)
    assert isinstance(module._maker((2,), "float32", 0), partial)
