# SPDX-License-Identifier: Apache-2.0
"""What authors of attention backends need to test theirs on a CPU.

Sentinels stand for tensors, `RecordingOps` for the ops, `stub_module` for modules that are not
installed, and `conformance` shows that the right tensors reach each op. Pure Python; every name
below is loaded on first use, so the pytest plugin costs nothing where it is not used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# public name -> the module that defines it
_PUBLIC = {
    "SCENARIOS": "fastkv.testing.scenarios",
    "Call": "fastkv.testing.recording",
    "RecordingOps": "fastkv.testing.recording",
    "Scenario": "fastkv.testing.scenarios",
    "SentinelError": "fastkv.testing.sentinels",
    "SentinelTensor": "fastkv.testing.sentinels",
    "conformance": "fastkv.testing.conformance",
    "sentinel_caches": "fastkv.testing.sentinels",
    "sentinel_layer": "fastkv.testing.sentinels",
    "sentinel_meta": "fastkv.testing.scenarios",
    "sentinel_qkv": "fastkv.testing.scenarios",
    "stub_module": "fastkv.testing.stubs",
}

__all__ = [
    "SCENARIOS",
    "Call",
    "RecordingOps",
    "Scenario",
    "SentinelError",
    "SentinelTensor",
    "conformance",
    "sentinel_caches",
    "sentinel_layer",
    "sentinel_meta",
    "sentinel_qkv",
    "stub_module",
]

if TYPE_CHECKING:
    from fastkv.testing import conformance
    from fastkv.testing.recording import Call, RecordingOps
    from fastkv.testing.scenarios import SCENARIOS, Scenario, sentinel_meta, sentinel_qkv
    from fastkv.testing.sentinels import (
        SentinelError,
        SentinelTensor,
        sentinel_caches,
        sentinel_layer,
    )
    from fastkv.testing.stubs import stub_module


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastkv.testing' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if module.__name__ == f"fastkv.testing.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
