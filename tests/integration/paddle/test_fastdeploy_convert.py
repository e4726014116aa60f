# SPDX-License-Identifier: Apache-2.0
"""Between the bytes of FastDeploy's int8 caches and fastkv's."""

import numpy as np
import paddle
import pytest

from fastkv import arrays
from fastkv.errors import (
    ContractError,
    UnknownNameError,
    UnsupportedError,
)
from fastkv.integrations import fastdeploy
from helpers.fastdeploy_engine import tensor
from helpers.sentinels import FORMATS


def engine_bytes(codes, side):
    """Where each code lies in the engine's cache, element by element, plus 128."""
    pages, heads, page, dim = codes.shape
    stored = np.zeros((pages, heads, page * dim), np.uint8)
    for token in range(page):
        for channel in range(dim):
            row, column = (token, channel) if side == "k" else (channel, token)
            width = dim if side == "k" else page
            at = (row // 16 * 16 + row % 8 + column // 16 % 2 * 8) * width + column // 32 * 32
            at += row % 16 // 8 * 16 + column % 8 // 2 * 4 + column % 16 // 8 * 2 + column % 2
            stored[:, :, at] = codes[:, :, token, channel].astype(np.int16) + 128
    return stored.reshape(codes.shape)


@pytest.mark.parametrize("side", ["k", "v"])
def test_int8_caches_are_converted_both_ways(side):
    rng = np.random.default_rng(6)
    codes = rng.integers(-127, 128, (3, 2, 64, 128)).astype(np.int8)
    stored = engine_bytes(codes, side)
    assert len(np.unique(stored)) == 255
    found = fastdeploy.cache_from_fastdeploy(tensor(stored), side)
    assert (arrays.to_host(found) == codes).all()
    assert found.dtype == paddle.int8
    for given in (tensor(codes), tensor(codes.view(np.uint8))):
        back = fastdeploy.cache_to_fastdeploy(given, side)
        assert (arrays.to_host(back) == stored).all()
        assert back.dtype == paddle.uint8


@pytest.mark.parametrize("convert", ["cache_from_fastdeploy", "cache_to_fastdeploy"])
def test_other_layouts_are_not_converted(convert):
    call = getattr(fastdeploy, convert)
    cache = paddle.zeros([1, 1, 64, 128], "uint8")
    for fmt in FORMATS:
        if fmt != "cache_int8":
            with pytest.raises(UnsupportedError, match=rf"{convert}: .*format {fmt}"):
                call(cache, "k", fmt)
    for shape in ([1, 1, 32, 128], [1, 1, 64, 64], [1, 64, 128]):
        with pytest.raises(
            UnsupportedError, match=rf"{convert}: cache .*expected \[N, Hkv, 64, 128\]"
        ):
            call(paddle.zeros(shape, "uint8"), "v")
    with pytest.raises(UnknownNameError, match="side"):
        call(cache, "q")
    with pytest.raises(ContractError, match=r"expected (int8 or )?uint8, got float32"):
        call(cache.astype("float32"), "k")
