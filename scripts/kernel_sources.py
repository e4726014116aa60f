# SPDX-License-Identifier: Apache-2.0
"""The kernel sources that a result was measured on, against those that there are.

A result holds `digests`: of each CUDA kernel that it times, by the kernel's name. performance.py
and formats.py use it, and the test of the GPU suite's report.
"""

from collections.abc import Iterable, Mapping
from typing import Any


def digests_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each kernel that a result times; empty if it names none."""
    return dict(result.get("digests", {}))


def stale(path: str, result: Mapping[str, Any], present: Mapping[str, str]) -> list[str]:
    """Why the result at `path` does not stand for the kernels of today; nothing if it does.

    Args:
        path: as the messages name it.
        result: the document.
        present: digest of each kernel that there is.
    """
    digests = digests_of(result)
    found = [
        f"{path}: measured on {kernel} {digest}, not {present.get(kernel, 'there any more')}"
        for kernel, digest in digests.items()
        if present.get(kernel) != digest
    ]
    timed = {row["op"] for row in result.get("rows", ())} & set(present)
    found += [f"{path}: has no digest of {kernel}" for kernel in sorted(timed - set(digests))]
    return found if digests else [f"{path}: has no digest of any kernel"]


def listed(results: Iterable[Mapping[str, Any]]) -> str:
    """Kernels and digests as the pages write them, once for all results.

    A kernel of which the results have several digests stands there with each.
    """
    pairs = {pair for result in results for pair in digests_of(result).items()}
    return ", ".join(f"`{kernel}` `{digest}`" for kernel, digest in sorted(pairs))
