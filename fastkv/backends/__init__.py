# SPDX-License-Identifier: Apache-2.0
"""Attention backends: which tensors go to which op. Pure Python, no array library.

`resolve` finds one layer's tensors in an engine's flat cache list, `select_backend` picks a
backend and says why, and the backends drive the ops, which are injected.
"""

from fastkv.backends.append import AppendBackend
from fastkv.backends.base import Backend, LayerOptions, Ops
from fastkv.backends.features import BACKEND_NAMES, FEATURES, Feature
from fastkv.backends.flash import FlashBackend
from fastkv.backends.flash_mask import FlashMaskBackend
from fastkv.backends.kernels import Device
from fastkv.backends.resolve import resolve
from fastkv.backends.select import (
    ENVIRONMENT_VARIABLE,
    Choice,
    get_backend,
    name_from_environment,
    select_backend,
)
from fastkv.cache import LayerCache

__all__ = [
    "BACKEND_NAMES",
    "ENVIRONMENT_VARIABLE",
    "FEATURES",
    "AppendBackend",
    "Backend",
    "Choice",
    "Device",
    "Feature",
    "FlashBackend",
    "FlashMaskBackend",
    "LayerCache",
    "LayerOptions",
    "Ops",
    "get_backend",
    "name_from_environment",
    "resolve",
    "select_backend",
]
