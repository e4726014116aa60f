# SPDX-License-Identifier: Apache-2.0
"""Moving quantized KV blocks between caches: processes, machines, stores.

A block is one page of all layers, with its scales. `Regions` finds its memory, `Fingerprint` says
what two caches must have in common, `checksums` guards its bytes, and an `Endpoint` moves it:

    regions = Regions(spec, caches)
    fingerprint = Fingerprint.of(spec, model="my-model", scales=scales)

    # the decode side
    async with Endpoint(regions, fingerprint) as endpoint:
        port = await endpoint.listen("127.0.0.1", 7301)
        received = await endpoint.receive("request 1", seconds=30)
        ...  # received.blocks are verified, and this process's own
        endpoint.ledger.free(received.blocks)

    # the prefill side
    async with Endpoint(regions, fingerprint) as endpoint:
        peer = await endpoint.connect("127.0.0.1", 7301)
        blocks = endpoint.ledger.allocate(16)
        ...  # write K and V into these pages
        outcome = await peer.push("request 1", blocks, seconds=5)
        outcome.state  # DONE, FAILED, or IN_DOUBT: then quarantined until it settles
        endpoint.ledger.free(blocks)

`Endpoint.offer` and `Session.pull` move blocks the other way round.
"""

from fastkv.transfer.endpoint import Endpoint
from fastkv.transfer.engine import ENGINES, Engine, Progress
from fastkv.transfer.fingerprint import Fingerprint
from fastkv.transfer.ledger import BlockState, Ledger
from fastkv.transfer.outcome import Outcome, Received, Stats, TransferState
from fastkv.transfer.regions import Region, Regions
from fastkv.transfer.session import Session
from fastkv.transfer.xxh3 import checksum, checksums

__all__ = [
    "ENGINES",
    "BlockState",
    "Endpoint",
    "Engine",
    "Fingerprint",
    "Ledger",
    "Outcome",
    "Progress",
    "Received",
    "Region",
    "Regions",
    "Session",
    "Stats",
    "TransferState",
    "checksum",
    "checksums",
]
