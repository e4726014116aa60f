# SPDX-License-Identifier: Apache-2.0
"""PyTorch tensors on the CPU."""

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
