# SPDX-License-Identifier: Apache-2.0
"""Pages in a real Redis: what is there comes back whole, and whatever fails is a miss."""

import time

import numpy as np
import pytest
import redis

from fastkv import CacheSpec, StaticScales
from fastkv.errors import BatchValueError, BlockIdError, ShapeError, SpecError
from fastkv.store import PageStore, RedisBackend, page_keys
from fastkv.transfer import Fingerprint, Regions
from helpers.redis_server import RedisServer

FORMATS = ("none", "cache_int8", "cache_int4_zp", "block_wise_fp8")
PAGES = 12
POISON = 0xA5


@pytest.fixture
def server(tmp_path):
    with_default = RedisServer(tmp_path)
    yield with_default
    with_default.resume()
    with_default.kill()


class Cache:
    """A cache of random bytes, or of poison, and its store."""

    def __init__(self, url, quant="block_wise_fp8", *, seed=None, model="m", **options):
        self.spec = CacheSpec(3, 2, 64, 16, quant)
        arrays = self.spec.allocate(PAGES)
        rng = np.random.default_rng(seed)
        for array in arrays:
            raw = array.view(np.uint8)
            raw[...] = POISON if seed is None else rng.integers(0, 256, raw.shape, np.uint8)
        scales = None
        if self.spec.layer_quant(0).needs_static:
            shape = (2, 64)
            values = [np.linspace(1, 2, 128, dtype=np.float32).reshape(shape)] * 4
            zp = values[:2] if quant == "cache_int4_zp" else (None, None)
            scales = dict.fromkeys(range(3), StaticScales(*values, *zp))
        self.regions = Regions(self.spec, arrays)
        fingerprint = Fingerprint.of(self.spec, model=model, scales=scales)
        options = {"deadline": 1.0, "cool_down": 0.2, **options}
        self.store = PageStore(self.regions, fingerprint, RedisBackend(url), **options)

    def block(self, i):
        return bytes(self.regions.read_block(i))

    def poisoned(self, i):
        return self.block(i) == bytes([POISON]) * self.regions.block_nbytes


KEYS = page_keys(list(range(PAGES * 16)), 16)


def wait_until(done, seconds=5.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("quant", FORMATS)
def test_pages_come_back_whole_at_other_places(server, quant):
    first, second = Cache(server.url, quant, seed=1), Cache(server.url, quant)
    sources, places = [7, 0, 11, 3], [2, 9, 4, 5]
    assert first.store.put(KEYS[:4], sources).done == (True,) * 4
    assert second.store.match(KEYS) == 4
    assert second.store.get(KEYS[:6], [*places, 6, 8]).reasons == (None,) * 4 + ("absent",) * 2
    for source, place in zip(sources, places, strict=True):
        assert second.block(place) == first.block(source)
    assert all(second.poisoned(i) for i in range(PAGES) if i not in places)
    counters = second.store.counters()
    assert (counters.hits, counters.misses, counters.state) == (4, {"absent": 2}, "closed")
    assert counters.hit_rate == pytest.approx(4 / 6)


def test_small_batches_give_the_same(server):
    first, second = Cache(server.url, seed=2, batch_bytes=1), Cache(server.url, batch_bytes=1)
    assert all(first.store.put(KEYS, range(PAGES)).done)
    assert second.store.get(KEYS, range(PAGES)).leading == PAGES
    assert [second.block(i) for i in range(PAGES)] == [first.block(i) for i in range(PAGES)]


@pytest.mark.parametrize("batch", [1, 2, 4096])
@pytest.mark.parametrize(("kept", "leading"), [((0, 1, 3, 4), 2), ((1, 2), 0), ((0, 1, 4, 5), 2)])
def test_a_match_ends_at_the_first_gap(server, monkeypatch, batch, kept, leading):
    monkeypatch.setattr("fastkv.store.store._MATCH_BATCH", batch)
    cache = Cache(server.url, seed=8)
    assert all(cache.store.put([KEYS[i] for i in kept], kept).done)
    assert cache.store.match(KEYS) == leading


def names(server):
    return redis.Redis.from_url(server.url).keys("fastkv:*")


def altered(value, how):
    if how == "scale":  # the last bytes of a page are scales of its last layer's V
        at = len(value) - 8 - 5
        return value[:at] + bytes([value[at] ^ 0x10]) + value[at + 1 :]
    if how == "k":
        return value[:80] + bytes([value[80] ^ 1]) + value[81:]
    if how == "key":
        return value[:40] + bytes([value[40] ^ 1]) + value[41:]
    return {"short": value[:-1], "long": value + b"x", "garbage": b"\xff" * len(value)}[how]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("scale", "checksum"),
        ("k", "checksum"),
        ("key", "invalid"),
        ("short", "invalid"),
        ("long", "invalid"),
        ("garbage", "invalid"),
    ],
)
def test_an_altered_value_is_a_miss_and_leaves_the_page(server, how, reason):
    first, second = Cache(server.url, seed=3), Cache(server.url)
    first.store.put(KEYS[:2], [0, 1])
    raw = redis.Redis.from_url(server.url)
    name = next(n for n in names(server) if n.endswith(KEYS[0].hex().encode()))
    raw.set(name, altered(raw.get(name), how))
    assert second.store.get(KEYS[:2], [4, 5]).reasons == (reason, None)
    assert second.poisoned(4)
    assert second.block(5) == first.block(1)


def test_a_value_of_another_type_is_a_miss(server):
    first = Cache(server.url, seed=3)
    first.store.put(KEYS[:2], [0, 1])
    raw = redis.Redis.from_url(server.url)
    name = next(n for n in names(server) if n.endswith(KEYS[0].hex().encode()))
    raw.delete(name)
    raw.lpush(name, "a")
    second = Cache(server.url)
    assert second.store.get(KEYS[:2], [4, 5]).done == (False, True)
    assert second.poisoned(4)


@pytest.mark.parametrize(("quant", "model"), [("none", "m"), ("block_wise_fp8", "other")])
def test_another_cache_sees_none_of_it(server, quant, model):
    first = Cache(server.url, seed=4)
    first.store.put(KEYS, range(PAGES))
    other = Cache(server.url, quant, model=model)
    assert other.store.match(KEYS) == 0
    assert set(other.store.get(KEYS, range(PAGES)).reasons) == {"absent"}
    assert all(map(other.poisoned, range(PAGES)))


def test_a_killed_store_is_misses_and_is_found_again(server):
    cache, other = Cache(server.url, seed=5), Cache(server.url)
    cache.store.put(KEYS[:3], [0, 1, 2])
    other.store.match(KEYS[:1])  # connects
    server.kill()
    began = time.monotonic()
    assert set(other.store.get(KEYS[:3], [0, 1, 2]).reasons) == {"error"}
    assert set(other.store.get(KEYS[:3], [0, 1, 2]).reasons) <= {"unavailable", "error"}
    assert other.store.match(KEYS) == 0
    assert not any(cache.store.put(KEYS[:3], [0, 1, 2]).done)
    assert time.monotonic() - began < 1.0
    assert all(map(other.poisoned, range(PAGES)))
    server.start()  # with nothing in it
    wait_until(lambda: all(cache.store.put(KEYS[:3], [0, 1, 2]).done))
    wait_until(lambda: other.store.get(KEYS[:3], [0, 1, 2]).leading == 3)
    assert [other.block(i) for i in range(3)] == [cache.block(i) for i in range(3)]
    assert other.store.counters().outages >= 1


def test_a_store_that_hangs_costs_one_deadline(server):
    cache, other = Cache(server.url, seed=6), Cache(server.url, deadline=0.3)
    cache.store.put(KEYS[:3], [0, 1, 2])
    other.store.match(KEYS[:1])
    server.stop()
    began = time.monotonic()
    assert set(other.store.get(KEYS[:3], [0, 1, 2]).reasons) == {"timeout"}
    assert 0.25 < time.monotonic() - began < 0.8
    began = time.monotonic()
    for _ in range(20):
        assert set(other.store.get(KEYS[:3], [0, 1, 2]).reasons) == {"unavailable"}
    assert time.monotonic() - began < 0.2
    assert all(map(other.poisoned, range(PAGES)))
    server.resume()
    wait_until(lambda: other.store.get(KEYS[:3], [0, 1, 2]).leading == 3)
    assert [other.block(i) for i in range(3)] == [cache.block(i) for i in range(3)]


def test_a_full_store_forgets_and_what_it_has_is_right(tmp_path):
    small = RedisServer(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru")
    try:
        cache, other = Cache(small.url, seed=7), Cache(small.url)
        keys = page_keys(list(range(3000 * 16)), 16)
        for at in range(0, len(keys), PAGES):
            cache.store.put(keys[at : at + PAGES], range(PAGES))
        hits = misses = 0
        for at in range(0, len(keys), PAGES):
            found = other.store.get(keys[at : at + PAGES], range(PAGES)).done
            for i in range(PAGES):
                if found[i]:
                    assert other.block(i) == cache.block(i)
            hits, misses = hits + sum(found), misses + PAGES - sum(found)
        assert hits > 0
        assert misses > 0
    finally:
        small.kill()


def test_a_store_that_takes_no_more_says_so(tmp_path):
    small = RedisServer(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction")
    try:
        cache, other = Cache(small.url, seed=8), Cache(small.url)
        keys = page_keys(list(range(1200 * 16)), 16)
        reasons = []
        for at in range(0, len(keys), PAGES):
            reasons += cache.store.put(keys[at : at + PAGES], range(PAGES)).reasons
        assert set(reasons) == {None, "refused"}
        assert cache.store.counters().state == "closed"
        kept = reasons.index("refused")
        assert other.store.get(keys[:PAGES], range(PAGES)).leading == min(kept, PAGES)
    finally:
        small.kill()


def test_values_expire(server):
    cache = Cache(server.url, seed=9)
    backend = RedisBackend(server.url, ttl=0.3)
    fingerprint = Fingerprint.of(cache.spec, model="m")
    with PageStore(cache.regions, fingerprint, backend) as store:
        store.put(KEYS[:1], [0])
        assert store.match(KEYS[:1]) == 1
        wait_until(lambda: store.match(KEYS[:1]) == 0)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (ShapeError, lambda store: store.put(KEYS[:2], [0])),
        (BlockIdError, lambda store: store.put(KEYS[:2], [0, PAGES])),
        (BlockIdError, lambda store: store.get(KEYS[:2], [3, 3])),
        (BatchValueError, lambda store: store.get([b"short"], [0])),
        (BatchValueError, lambda store: store.match(["text"])),
        (SpecError, lambda store: store.get(KEYS[:1], [0], deadline=0)),
    ],
)
def test_the_callers_faults_raise_and_send_nothing(server, error, call):
    cache = Cache(server.url, seed=10)
    with pytest.raises(error, match="PageStore"):
        call(cache.store)
    assert names(server) == []
