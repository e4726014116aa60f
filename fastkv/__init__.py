# SPDX-License-Identifier: Apache-2.0
"""The KV-cache layer that attention backends import.

fastkv decides which cache tensors, scales and zero points go to which op, refuses every
combination that would corrupt an output or crash a kernel, and runs the ops.

Importing this package imports no array library: every public name below is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "BatchMeta": "fastkv.batch",
    "CacheSpec": "fastkv.spec",
    "LayerCache": "fastkv.cache",
    "QuantSpec": "fastkv.quant",
    "QuantType": "fastkv.quant",
    "Rope": "fastkv.rope",
    "StaticScales": "fastkv.scales",
    "backends": "fastkv.backends",
    "distributed": "fastkv.distributed",
    "errors": "fastkv.errors",
    "ops": "fastkv.ops",
    "testing": "fastkv.testing",
    "warmup": "fastkv.warming",
}

__all__ = [
    "BatchMeta",
    "CacheSpec",
    "LayerCache",
    "QuantSpec",
    "QuantType",
    "Rope",
    "StaticScales",
    "__version__",
    "backends",
    "distributed",
    "errors",
    "ops",
    "testing",
    "warmup",
]

if TYPE_CHECKING:
    from fastkv import backends, distributed, errors, ops, testing
    from fastkv.batch import BatchMeta
    from fastkv.cache import LayerCache
    from fastkv.quant import QuantSpec, QuantType
    from fastkv.rope import Rope
    from fastkv.scales import StaticScales
    from fastkv.spec import CacheSpec
    from fastkv.warming import warmup


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastkv' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if module.__name__ == f"fastkv.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
