# SPDX-License-Identifier: Apache-2.0
"""The flash_mask backend."""

from fastkv.backends.flash import GatheringBackend


class FlashMaskBackend(GatheringBackend):
    """As flash, on fastkv's own kernel, with an interval of visible keys per query row."""

    name = "flash_mask"
