# SPDX-License-Identifier: Apache-2.0
"""What the kernels do not serve is refused by the op as by selection: from the same table."""

from typing import TYPE_CHECKING

from fastkv.backends.kernels import KERNELS, Device, Lack, lacks
from fastkv.errors import UnsupportedError
from fastkv.ops.cuda import jit

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.contracts.tensors import Checker


def require_served(checker: "Checker", cache: "LayerCache", index: int) -> None:
    """Raise unless the table serves a checked call: device, format and shapes.

    A launcher asks once for each metadata.

    Args:
        checker: the checked call.
        cache: the layer's cache.
        index: the device that its tensors live on.

    Raises:
        UnsupportedError: with the reason that `select_backend` gives.
    """
    sizes, spec = checker.sizes, cache.spec
    found = lacks(
        KERNELS["cuda"],
        _device(index),
        head_dim=spec.head_dim,
        page_size=spec.page_size,
        storage=[spec.storage_dtype(cache.layer_id)],
        group=sizes["Hq"] // sizes["Hkv"] if "Hq" in sizes else None,
    )
    _raise_first(checker, found)


def require_device(checker: "Checker", cache: "LayerCache | None", index: int) -> None:
    """Raise unless the device runs the kernels, and has what the cache's format needs.

    For ops whose kernels serve more shapes than the table promises for a backend.

    Args:
        checker: the checked call.
        cache: the layer's cache; None for an op without one.
        index: the device that its tensors live on.

    Raises:
        UnsupportedError: with the reason that `select_backend` gives.
    """
    storage = () if cache is None else (cache.spec.storage_dtype(cache.layer_id),)
    found = lacks(KERNELS["cuda"], _device(index), storage=storage)
    _raise_first(checker, [lack for lack in found if lack.argument == "device"])


def _device(index: int) -> Device:
    return Device("cuda", jit.device_facts(index).sm)


def _raise_first(checker: "Checker", found: list[Lack]) -> None:
    for lack in found:
        raise UnsupportedError(
            checker.op,
            lack.argument,
            format=checker.format,
            expected=lack.expected,
            got=lack.got,
            hint=f"The CUDA kernels: {lack.reason}.",
        )
