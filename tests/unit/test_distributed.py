# SPDX-License-Identifier: Apache-2.0
"""Placement, the groups that are taken, and NumPy ranks as threads."""

import pickle
import threading
from collections import Counter

import numpy as np
import pytest

from fastkv import CacheSpec
from fastkv.distributed import ContextParallel, Group, Placement, TensorParallel, group_of
from fastkv.errors import (
    BatchValueError,
    CollectiveError,
    ContractError,
    DtypeError,
    ShapeError,
    SpecError,
    SpecMismatchError,
)
from helpers.compare import assert_close, assert_same_bits
from helpers.parallel_cases import CASES, P, exact, make, one_rank, run


class Threads:
    """A group of threads of this process."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=20)
        self.messages = [None] * size

    def rank(self, rank):
        return Thread(self, rank, len(self.messages))


class Thread:
    def __init__(self, all_ranks, rank, size):
        self.all_ranks, self.rank, self.size = all_ranks, rank, size
        self.sent = Counter()

    def all_gather(self, message, *, blocking):
        self.sent[blocking] += 1
        self.all_ranks.messages[self.rank] = message
        self.all_ranks.barrier.wait()
        found = list(self.all_ranks.messages)
        self.all_ranks.barrier.wait()
        return found


class Alone:
    rank, size = 0, 1

    def all_gather(self, message, *, blocking):
        raise AssertionError("nobody to hear it")


def on_ranks(size, work):
    """What `work(group)` returns on each rank."""
    found, all_ranks = [None] * size, Threads(size)

    def go(rank):
        found[rank] = work(all_ranks.rank(rank))

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("page", [1, 4, 16])
def test_every_token_has_one_rank(size, page):
    tokens = np.arange(4 * size * page + 3, dtype=np.int32)
    owner = tokens // page % size
    for rank in range(size):
        placement = Placement(rank, size, page)
        keys = placement.keys(tokens)
        assert keys.dtype == np.int32
        assert keys.tolist() == [int((owner[:n] == rank).sum()) for n in tokens]
        pages = [len(set(tokens[:n][owner[:n] == rank] // page)) for n in tokens]
        assert [placement.num_pages(int(n)) for n in tokens] == pages


@pytest.mark.parametrize("numbers", [(0, 0, 4), (2, 2, 4), (-1, 2, 4), (0, 1, 0), (0.0, 1, 4)])
def test_a_placement_that_cannot_be_is_refused(numbers):
    with pytest.raises(SpecError, match="Placement"):
        Placement(*numbers)


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 3) for name in CASES), ("window", 1), ("window", 2)]
)
def test_numpy_ranks_attend_over_the_whole_context(name, size):
    page = CASES[name].get("page", P)
    found = on_ranks(size, lambda group: run(ContextParallel(group, page), name, "numpy"))
    batch, options = make(name)
    q, *_ = one_rank(batch, options)
    want, want_lse = exact(batch, q, options)
    for out, lse, alone in found:
        assert_close(out, want, batch.format)
        assert_close(lse, want_lse, batch.format)
        assert alone
        assert_same_bits(out, found[0][0])


def test_one_message_a_call_and_on_the_cpu_one_question():
    def work(group):
        context = ContextParallel(group, P)
        for _ in range(3):
            run(context, "window", "numpy")
        run(context, "decode none", "numpy")
        return group.sent

    assert on_ranks(2, work) == [{True: 4, False: 4}] * 2


def test_one_rank_sends_nothing():
    run(ContextParallel(Alone(), P), "window", "numpy")
    out = np.ones((3, 4, 64), np.float32)
    assert TensorParallel(Alone(), CacheSpec(1, 2, 64, 16), 4).all_gather(out) is out


def test_groups_that_are_taken():
    group = Alone()
    assert group_of(group) is group
    assert isinstance(group, Group)
    for other in (None, object(), 3):
        with pytest.raises(DtypeError, match=r"group_of: group: expected a process group of torch"):
            group_of(other)
    outside = Thread(None, -1, 2)
    with pytest.raises(ContractError, match="a group that this process belongs to"):
        group_of(outside)
    for timeout in (0, -1.0, float("inf"), "1"):
        with pytest.raises(ContractError, match="timeout"):
            group_of(group, timeout)


def test_heads_that_cannot_be_shared_out_are_refused():
    group = Thread(None, 1, 4)
    for heads in (0, 6, 10, 4.0):
        with pytest.raises(SpecError, match="a multiple of the 4 KV heads and of the 4 ranks"):
            TensorParallel(group, CacheSpec(1, 4, 64, 16), heads)
    with pytest.raises(SpecError, match="and of the 4 ranks"):
        TensorParallel(group, CacheSpec(1, 2, 64, 16), 6)
    with pytest.raises(SpecError, match="tp_size"):
        TensorParallel(group, CacheSpec(1, 3, 64, 16), 12)
    parallel = TensorParallel(group, CacheSpec(1, 2, 64, 16), 8)
    assert (parallel.kv_heads, parallel.query_heads) == (range(0, 1), range(2, 4))
    assert parallel.columns() == (slice(128, 256), slice(512, 576), slice(640, 704))
    with pytest.raises(ShapeError, match="out"):
        parallel.all_gather(np.ones((3, 4, 64), np.float32))


def test_heads_come_together_in_order():
    def work(group):
        out = np.full((3, 2, 16), group.rank, np.float32)
        return TensorParallel(group, CacheSpec(1, 2, 16, 4), 4).all_gather(out)

    for whole in on_ranks(2, work):
        assert whole[:, :, 0].tolist() == [[0, 0, 1, 1]] * 3


def test_a_wrong_batch_is_refused():
    batch, _ = make("window")
    context = ContextParallel(Alone(), P)
    with pytest.raises(BatchValueError, match=r"cu_seqlens_q\[0\]: expected 0, got 1"):
        context.step(**{**batch.meta, "cu_seqlens_q": batch.cu_seqlens_q + 1})
    with pytest.raises(DtypeError, match=r"ContextParallel.step: cache_seqlens"):
        context.step(**{**batch.meta, "cache_seqlens": batch.cache_seqlens.astype(float)})
    with pytest.raises(ShapeError, match="block_table"):
        context.step(**{**batch.meta, "block_table": batch.block_table[1:]})
    q = np.zeros((len(batch.qkv), batch.query_heads, 64), np.float32)
    for page in (8, 32):
        step = ContextParallel(Alone(), page).step(**batch.meta)
        with pytest.raises(SpecMismatchError, match=f"expected {page}, as of the ContextParallel"):
            step.paged_attention(q, batch.cache)
        with pytest.raises(SpecMismatchError, match="rope_write_kv"):
            step.rope_write_kv(batch.qkv, batch.cache)
    step = context.step(**batch.meta)
    with pytest.raises(ContractError, match="window"):
        step.paged_attention(q, batch.cache, window=0)
    with pytest.raises(ShapeError, match="sinks"):
        step.paged_attention(q, batch.cache, sinks=np.zeros(1, np.float32))
    mask = np.tile(np.array([0, 10**6], np.int32), (len(q), 1))  # not cut to the keys there are
    with pytest.raises(BatchValueError, match="mask_offsets"):
        context.step(**batch.meta, mask_offsets=mask).paged_attention(q, batch.cache)
    long = batch.cache_seqlens + 10**6
    with pytest.raises(BatchValueError, match="cache_seqlens"):
        context.step(**{**batch.meta, "cache_seqlens": long}).paged_attention(q, batch.cache)


def test_the_error_of_a_message_survives_pickling():
    error = pickle.loads(pickle.dumps(CollectiveError("op", 1, 2, "gone")))
    assert str(error) == "op: rank 1 of 2 did not get all ranks' messages: gone"
    assert (error.op, error.rank, error.size, error.reason) == ("op", 1, 2, "gone")


def test_no_array_library_is_imported(run_python):
    libraries = {"numpy", "torch", "paddle"}
    run_python(f"import sys, fastkv.distributed; assert not {libraries} & set(sys.modules)")
