# SPDX-License-Identifier: Apache-2.0
"""Contexts and heads over two gloo ranks of Paddle, each a process."""

import socket

import numpy as np
import pytest

from helpers.compare import assert_close, assert_same_bits
from helpers.parallel_cases import CASES, exact, make, one_rank
from helpers.ranks import run_ranks


def free_port():
    """The first of three ports in a row that nobody listens on."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
        try:
            for following in (port + 1, port + 2):
                with socket.socket() as other:
                    other.bind(("127.0.0.1", following))
        except (OSError, OverflowError):
            continue
        return port


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks("paddle_ranks", 2, folder, str(free_port()))


@pytest.mark.parametrize("name", CASES)
def test_ranks_attend_over_the_whole_context(ranks, name):
    batch, options = make(name)
    q, *_ = one_rank(batch, options)
    want, want_lse = exact(batch, q, options)
    for found in ranks:
        out, lse, alone = found[name]
        assert_close(out, want, batch.format)
        assert_close(lse, want_lse, batch.format)
        assert_same_bits(out, ranks[0][name][0])
        assert alone


def test_heads_come_together_in_order(ranks):
    want = np.repeat([0.0, 1.0], 2)[None, :, None]
    for found in ranks:
        assert (found["heads"] == np.broadcast_to(want, (3, 4, 16))).all()
        assert "expected T = 1 as on rank 0, got T = 2" in found["at odds"]
