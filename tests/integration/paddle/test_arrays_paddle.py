# SPDX-License-Identifier: Apache-2.0
"""Paddle tensors on the CPU."""

import numpy as np
import paddle
import pytest

from fastkv import arrays, ops
from fastkv.errors import DtypeError, PlacementError, UnsupportedError
from helpers.array_suite import ForeignArraySuite, Tensors
from helpers.batches import make_batch
from helpers.compare import assert_same_bits

RAW = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


class PaddleTensors(Tensors):
    name = "paddle"

    def make(self, host):
        raw = RAW[host.itemsize]
        bits = np.array(host, order="C").reshape(host.shape).view(raw)
        tensor = paddle.to_tensor(bits, place=paddle.CPUPlace())
        return tensor if raw == host.dtype.name else tensor.view(host.dtype.name)

    def address(self, tensor):
        return tensor.data_ptr()

    def bits(self, tensor):
        raw = RAW[tensor.element_size()]
        dense = tensor.detach().contiguous()
        dense = dense if self.has_dtype(dense, raw) else dense.view(raw)
        return dense.numpy().view(f"u{tensor.element_size()}").copy()

    def has_dtype(self, tensor, name):
        return tensor.dtype == getattr(paddle, name)

    def strides(self, tensor):
        return tuple(tensor.strides)

    def overwrite(self, tensor, bits):
        raw = RAW[bits.itemsize]
        own = tensor if self.has_dtype(tensor, raw) else tensor.view(raw)
        paddle.assign(paddle.to_tensor(bits.view(raw)), own)

    def transpose(self, tensor):
        return tensor.t()


class TestPaddle(ForeignArraySuite):
    tensors = PaddleTensors()


TENSORS = TestPaddle.tensors


def test_parameter_is_viewed_and_written():
    parameter = paddle.create_parameter([3], "float32")
    view = arrays.to_host(parameter)
    assert view.ctypes.data == parameter.data_ptr()
    view[...] = [1, 7, 3]
    assert parameter.tolist() == [1, 7, 3]
    assert arrays.describe(parameter) == ("paddle", "cpu", "float32", (3,), True)


def test_op_takes_parameters_and_tensors_of_a_graph():
    rng = np.random.default_rng(0)
    batch = make_batch(rng)
    weight = rng.standard_normal(64).astype(np.float32)
    want = ops.rope_write_kv(batch.qkv, batch.cache, **batch.meta, q_norm_weight=weight)
    given = TENSORS.of({"cache": batch.cache, **batch.meta})
    parameter = paddle.create_parameter([64], "float32")
    parameter.set_value(weight)
    qkv = paddle.to_tensor(batch.qkv, stop_gradient=False)
    got = ops.rope_write_kv(qkv, given.pop("cache"), **given, q_norm_weight=parameter)
    assert got.stop_gradient
    assert_same_bits(TENSORS.bits(got), want)


@pytest.mark.parametrize(
    "make", [lambda: paddle.zeros([3]), lambda: paddle.create_parameter([3], "float32")]
)
def test_shape_is_a_plain_tuple(make):
    info = arrays.describe(make())
    assert type(info.shape) is tuple
    assert info.shape == (3,)


@pytest.mark.parametrize("dtype", ["float64", "bool", "int64", "complex64"])
def test_op_names_the_dtype_that_it_refuses(dtype):
    batch = make_batch(np.random.default_rng(2))
    given = TENSORS.of({"cache": batch.cache, **batch.meta})
    qkv = paddle.zeros(list(batch.qkv.shape), dtype=dtype)
    with pytest.raises(DtypeError) as caught:
        ops.rope_write_kv(qkv, given.pop("cache"), **given)
    assert caught.value.got == dtype


@pytest.mark.parametrize("kind", ["coo", "csr"])
def test_sparse_tensor_is_refused(kind):
    dense = paddle.eye(3)
    sparse = dense.to_sparse_coo(2) if kind == "coo" else dense.to_sparse_csr()
    for take, op in (
        (lambda tensor: arrays.describe(tensor, "some_op", "some_argument"), "some_op"),
        (arrays.to_host, "to_host"),
    ):
        with pytest.raises(UnsupportedError) as caught:
            take(sparse)
        assert caught.value.op == op
        assert caught.value.got == "a sparse tensor"
    assert arrays.to_host(sparse.to_dense()).tolist() == np.eye(3).tolist()


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "nowhere", ""])
def test_device_that_is_none_is_refused(device):
    array = np.zeros(3, np.float32)
    for call, op in (
        (lambda: arrays.zeros("paddle", (3,), "float32", device), "zeros"),
        (lambda: arrays.convert(array, "paddle", device), "from_host"),
    ):
        with pytest.raises(PlacementError) as caught:
            call()
        error = caught.value
        assert (error.op, error.argument, error.got) == (op, "device", device)
        assert error.expected == "cuda:N for paddle"
