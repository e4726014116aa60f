# SPDX-License-Identifier: Apache-2.0
"""Quantized KV pages in an external store: Redis, Valkey, or one of your own.

`page_keys` names a request's pages by their tokens; a `PageStore` puts pages under these names and
gets them back, verified, from any process whose cache has the same fingerprint.
"""

from fastkv.store.backend import Backend
from fastkv.store.counters import StoreCounters
from fastkv.store.keys import page_keys
from fastkv.store.memory import InMemoryBackend
from fastkv.store.redis import RedisBackend
from fastkv.store.results import PageResults
from fastkv.store.store import PageStore

__all__ = [
    "Backend",
    "InMemoryBackend",
    "PageResults",
    "PageStore",
    "RedisBackend",
    "StoreCounters",
    "page_keys",
]
