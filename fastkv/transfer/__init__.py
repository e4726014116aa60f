# SPDX-License-Identifier: Apache-2.0
"""Moving quantized KV blocks between caches: processes, machines, stores.

A block is one page of all layers, with its scales. `Regions` finds its memory, `Fingerprint` says
what two caches must have in common, `checksums` guards its bytes.
"""

from fastkv.transfer.checksum import checksum, checksums
from fastkv.transfer.fingerprint import Fingerprint
from fastkv.transfer.regions import Region, Regions

__all__ = ["Fingerprint", "Region", "Regions", "checksum", "checksums"]
