# SPDX-License-Identifier: Apache-2.0
"""Static scales: the bundle, its formulas, and the files it lives in."""

from fastkv.scales.bundle import FIELDS, StaticScales
from fastkv.scales.engine import (
    load_checkpoint,
    load_fastdeploy_json,
    save_checkpoint,
    save_fastdeploy_json,
)
from fastkv.scales.native import load_scales, save_scales

__all__ = [
    "FIELDS",
    "StaticScales",
    "load_checkpoint",
    "load_fastdeploy_json",
    "load_scales",
    "save_checkpoint",
    "save_fastdeploy_json",
    "save_scales",
]
