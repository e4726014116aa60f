# SPDX-License-Identifier: Apache-2.0
"""Optional packages: imported when first needed, and asked for by the line that installs them."""

from importlib import import_module
from typing import Any

from fastkv.errors import MissingDependencyError


def require(module: str, purpose: str, install: str) -> Any:
    """Import a module, or raise `MissingDependencyError` with the line that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # it is there, and something of its own is missing
        raise MissingDependencyError(purpose, module, install) from error
