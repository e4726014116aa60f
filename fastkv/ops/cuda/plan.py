# SPDX-License-Identifier: Apache-2.0
"""What all launchers do at each call: addresses, stream, fault word, launch."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastkv.arrays.library import OnDevice
from fastkv.ops.cuda import faults
from fastkv.ops.cuda.launch import Kernel

if TYPE_CHECKING:
    from fastkv.contracts.tensors import Checker


class Plan(NamedTuple):
    """What a call's metadata decides; a launcher keeps it in `checker.prepared`.

    Attributes:
        kernel: the specialization, on the call's device.
        grid: blocks.
        on_device: the call's library.
        constants: bytes of the parameter struct that stay the same.
    """

    kernel: Kernel
    grid: int
    on_device: OnDevice
    constants: bytes

    def stream(self) -> int:
        """The library's current stream on the call's device."""
        return self.on_device.stream(self.kernel.index)

    def addresses(self, tensors: Iterable[Any]) -> list[int]:
        """Where tensors lie; 0 for None. Read at each call: `set_` moves a tensor."""
        pointer = self.on_device.pointer
        return [0 if tensor is None else pointer(tensor) for tensor in tensors]

    def launch(
        self, checker: "Checker", stream: int, addresses: Sequence[int], *scalars: float
    ) -> None:
        """Launch a kernel whose struct is addresses, fault word, constants, scalars.

        Raises:
            BatchValueError: under `FASTKV_CHECK=1`, what the kernel noted.
        """
        noted = faults.word(self.kernel.index, stream)
        self.kernel.launch(stream, self.grid, *addresses, noted, self.constants, *scalars)
        if noted:
            faults.raise_noted(checker, noted, stream)
