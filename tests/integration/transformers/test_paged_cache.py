# SPDX-License-Identifier: Apache-2.0
"""A PagedCache goes where a DynamicCache goes, step by step, and holds the same K and V."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from fastkv.integrations.transformers import PagedCache, calibrate
from fastkv.integrations.transformers.pages import Pages
from fastkv.scales.calibration import calibrate as calibrate_layer
from helpers.tiny_models import VOCABULARY, poison, prompts, tiny


class Beside:
    """A model over both caches; every step is taken by each."""

    def __init__(self, seed, page_size):
        self.random = random.Random(seed)
        self.own, self.paged = tiny(attention="sdpa"), tiny()
        self.caches = (DynamicCache(), PagedCache(page_size=page_size))
        self.batch = 2
        self.forward(5)

    def forward(self, new):
        tokens = [
            [self.random.randrange(VOCABULARY) for _ in range(new)] for _ in range(self.batch)
        ]
        ids = torch.tensor(tokens)
        with torch.no_grad():
            want = self.own(ids, past_key_values=self.caches[0]).logits
            got = self.paged(ids, past_key_values=self.caches[1]).logits
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

    def each(self, method, *arguments):
        for cache in self.caches:
            getattr(cache, method)(*arguments)

    def step(self):
        length = self.caches[1].length
        kind = self.random.choice(["one", "some", "reorder", "reorder", "crop", "batch"])
        if kind == "one" or length < 3:
            self.forward(1)
        elif kind == "some":
            self.forward(self.random.randint(2, 9))
        elif kind == "reorder":
            self.each("reorder_cache", torch.tensor(self.some_requests(self.batch)))
        elif kind == "crop":
            self.each("crop", -self.random.randint(0, length - 1))
        elif self.batch < 4:
            self.each("batch_repeat_interleave", 2)
            self.batch *= 2
        else:
            kept = self.some_requests(self.random.randint(1, 3))
            self.each("batch_select_indices", torch.tensor(kept))
            self.batch = len(kept)
        return kind

    def some_requests(self, count):
        return [self.random.randrange(self.batch) for _ in range(count)]

    def check(self):
        dynamic, paged = self.caches
        assert (paged.get_seq_length(), paged.batch_size) == (dynamic.get_seq_length(), self.batch)
        poison(paged)
        for index, layer in enumerate(dynamic.layers):
            k, v = paged.keys_values(index)
            torch.testing.assert_close(k, layer.keys, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(v, layer.values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_steps_leaves_what_a_dynamic_cache_holds(seed):
    beside = Beside(seed, page_size=(1, 4, 7)[seed % 3])
    kinds = [beside.step() for _ in range(14) if not beside.check()]
    beside.check()
    assert len(set(kinds)) > 2


def test_a_reset_cache_serves_another_batch():
    model, cache = tiny(), PagedCache(page_size=4)
    for lengths in ((9, 9), (6, 6), (5, 5, 5), (1,)):
        ids = prompts(lengths)["input_ids"]
        with torch.no_grad():
            got = model(ids, past_key_values=cache).logits
            want = tiny(attention="sdpa")(ids).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert cache.length == lengths[0]
        cache.reorder_cache(torch.zeros(len(lengths), dtype=torch.long))
        cache.reset()
        assert cache.length == 0


@pytest.mark.parametrize("form", ["none", "block_wise_fp8"])
def test_a_prepared_cache_has_its_memory_and_serves_the_same(form):
    model, inputs = tiny(), prompts((9, 5))
    cache = PagedCache(form, page_size=8, reserve=50)
    assert cache.prepare(model, 6) is cache
    assert (cache.batch_size, cache.length) == (6, 0)
    assert cache._storage.layer(2, 0).k.shape[:2] == (6 * 7, 2)
    options = {"max_new_tokens": 30, "num_beams": 3, "do_sample": False}
    got = model.generate(**inputs, past_key_values=cache, **options)
    want = model.generate(**inputs, past_key_values=PagedCache(form, page_size=8), **options)
    assert torch.equal(got, want)


def test_reordering_copies_only_the_page_that_is_being_filled():
    pages = Pages(3, 4, page_size=8, device="cpu")
    before = pages.table.clone()
    copies = pages.reorder(torch.tensor([2, 2, 0]), length=19)
    assert copies.src.tolist() == before[[2, 2, 0], 2].tolist()
    assert not set(copies.dst.tolist()) & set(before.flatten().tolist())
    assert pages.table[:, :2].tolist() == before[[2, 2, 0], :2].tolist()
    assert pages.table[:, 2].tolist() == copies.dst.tolist()
    assert pages.table[:, 3].tolist() == before[:, 3].tolist()
    assert pages.count == 15
    assert pages.reorder(torch.tensor([0, 0, 0]), length=16) is None


@pytest.mark.parametrize("seed", range(20))
def test_no_page_that_is_written_belongs_to_two(seed):
    generator = random.Random(seed)
    pages, length = Pages(3, 2, page_size=4, device="cpu"), 0
    for _ in range(40):
        kind = generator.choice(["fill", "reorder", "crop"])
        if kind == "fill":
            length += generator.randint(1, 5)
            if length > pages.capacity:
                pages.grow(-(-length // 4))
        elif kind == "reorder":
            pages.reorder(torch.tensor([generator.randrange(3) for _ in range(3)]), length)
        else:
            length -= generator.randint(0, length)
            pages.crop(length)
        written = pages.table[:, length // 4 :].flatten().tolist()
        full = set(pages.table[:, : length // 4].flatten().tolist())
        assert len(set(written)) == len(written)
        assert not full & set(written)
        assert pages.table.min() >= 0
        assert pages.table.max() < pages.count
    assert pages.count <= 3 * pages.columns + 3


@pytest.mark.parametrize("page_size", [4, 64])
def test_what_is_read_back_is_what_the_format_keeps(page_size):
    ids = prompts((11, 11))["input_ids"]
    exact, cache = PagedCache(), PagedCache("block_wise_fp8", page_size=page_size)
    with torch.no_grad():
        for each in (exact, cache):
            tiny()(ids, past_key_values=each)
    for got, want in zip(cache.keys_values(0), exact.keys_values(0), strict=True):
        # e4m3 rounds to 3 bits behind the first; below 2**-6 of a unit, to steps of 2**-9.
        unit = want.abs().amax(-1, keepdim=True) / 448
        assert ((got - want).abs() <= want.abs() / 16 + unit / 1024 + 1e-7).all()
        assert not torch.equal(got, want)


def test_a_cache_of_several_formats():
    formats = ["none", "block_wise_fp8", "none"]
    ids = prompts((30, 30))["input_ids"]
    exact, cache = PagedCache(), PagedCache(formats)
    with torch.no_grad():
        for each in (exact, cache):
            tiny()(ids, past_key_values=each)
    assert torch.equal(cache.keys_values(0)[1], exact.keys_values(0)[1])
    off = (cache.keys_values(1)[1] - exact.keys_values(1)[1]).abs().max()
    assert 0 < off < 0.04 * exact.keys_values(1)[1].abs().max()
    assert [cache.spec.layer_quant(i).name.value for i in range(3)] == formats


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_calibration_reads_what_a_dynamic_cache_holds(granularity):
    ids = prompts((70, 70))["input_ids"]
    seen, own = PagedCache(page_size=16), DynamicCache()
    with torch.no_grad():
        tiny()(ids, past_key_values=seen)
        tiny(attention="sdpa")(ids, past_key_values=own)
    options = {"granularity": granularity, "headroom": 1.5}
    got = calibrate(seen, "cache_int8", **options)
    assert list(got) == [0, 1, 2]
    for index, layer in enumerate(own.layers):
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (layer.keys, layer.values))
        want = calibrate_layer(k, v, "cache_int8", **options)
        for name in ("k_quant", "k_dequant", "v_quant", "v_dequant"):
            np.testing.assert_allclose(getattr(got[index], name), getattr(want, name), rtol=1e-4)


def test_a_copy_goes_its_own_way():
    model, first, others = tiny(), prompts((9, 9))["input_ids"], [5, 6]
    prefix = PagedCache(page_size=4)
    with torch.no_grad():
        model(first, past_key_values=prefix)
        before = [x.clone() for x in prefix.keys_values(1)]
        for token in others:
            cache, ids = copy.deepcopy(prefix), torch.full((2, 3), token)
            got = model(ids, past_key_values=cache).logits
            want = tiny(attention="sdpa")(torch.cat([first, ids], 1)).logits[:, 9:]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert all(map(torch.equal, prefix.keys_values(1), before))
