# SPDX-License-Identifier: Apache-2.0
"""What the kernels do not serve is refused by the op as by selection: from the same table."""

from typing import TYPE_CHECKING

from fastkv.backends.kernels import KERNELS, Device, lacks
from fastkv.errors import UnsupportedError
from fastkv.ops.cuda import jit

if TYPE_CHECKING:
    from fastkv.cache import LayerCache
    from fastkv.contracts.tensors import Checker


def require_served(checker: "Checker", cache: "LayerCache | None", index: int) -> None:
    """Raise unless the kernels serve a checked call; a launcher asks once for each metadata.

    Args:
        checker: the checked call.
        cache: the layer's cache; None for an op without one.
        index: the device that its tensors live on.

    Raises:
        UnsupportedError: with the reason that `select_backend` gives.
    """
    row, device = KERNELS["cuda"], Device("cuda", jit.device_facts(index).sm)
    if cache is None:
        found = lacks(row, device)
    else:
        sizes, spec = checker.sizes, cache.spec
        found = lacks(
            row,
            device,
            head_dim=spec.head_dim,
            page_size=spec.page_size,
            storage=[spec.storage_dtype(cache.layer_id)],
            group=sizes["Hq"] // sizes["Hkv"] if "Hq" in sizes else None,
        )
    for lack in found:
        raise UnsupportedError(
            checker.op,
            lack.argument,
            format=checker.format,
            expected=lack.expected,
            got=lack.got,
            hint=f"The CUDA kernels: {lack.reason}.",
        )
