# SPDX-License-Identifier: Apache-2.0
"""What the kernels do not serve is refused by the op as by selection: from the same table."""

from typing import TYPE_CHECKING, Any

from fastkv.backends.kernels import KERNELS, Device, Lack, lacks
from fastkv.errors import UnsupportedError
from fastkv.ops.cuda import jit

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.contracts.tensors import Checker


def require_served(checker: "Checker", cache: "LayerCache | None", index: int) -> None:
    """Raise unless the table serves a checked call: device, format and shapes.

    A launcher asks once for each metadata.

    Args:
        checker: the checked call.
        cache: the layer's cache; None for an op without one, which is asked about its device and
            its head dim: the other limits are those of kernels that read pages.
        index: the device that its tensors live on.

    Raises:
        UnsupportedError: with the reason that `select_backend` gives.
    """
    sizes = checker.sizes
    paged: dict[str, Any] = {} if cache is None else {"page_size": cache.spec.page_size}
    if cache is not None and "Hq" in sizes:
        paged["group"] = sizes["Hq"] // sizes["Hkv"]
    found = lacks(
        KERNELS["cuda"], _device(index), head_dim=sizes["D"], storage=_storage(cache), **paged
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
    found = lacks(KERNELS["cuda"], _device(index), storage=_storage(cache))
    _raise_first(checker, [lack for lack in found if lack.argument == "device"])


def _storage(cache: "LayerCache | None") -> tuple[str, ...]:
    return () if cache is None else (cache.spec.storage_dtype(cache.layer_id),)


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
