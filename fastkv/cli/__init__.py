# SPDX-License-Identifier: Apache-2.0
"""The command `fastkv`."""

from fastkv.cli.app import app, main

__all__ = ["app", "main"]
