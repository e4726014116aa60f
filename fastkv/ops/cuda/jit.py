# SPDX-License-Identifier: Apache-2.0
"""From a kernel's source to a function on a device: the one compile path.

A specialization is a kernel and its `-D` constants. CuPy compiles it with NVRTC and keeps the
binary on disk, under a key that holds the options and not the headers; so the digest of the
kernel's sources is one of the options: an edited header compiles anew, where it is included.
"""

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fastkv.ops.cuda.includes import closure
from fastkv.optional import require

INSTALL = "pip install 'fastkv[cuda12]' (or cuda13)"


@dataclass(frozen=True, slots=True)
class Specialization:
    """One kernel, compiled for one set of constants.

    Attributes:
        kernel: its name: the `.cu` file and the entry point.
        defines: `-D` constants, sorted by name.
    """

    kernel: str
    defines: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def of(cls, kernel: str, **defines: object) -> "Specialization":
        """With constants by keyword; each becomes `-DFASTKV_<NAME>=<value>`."""
        named = ((f"FASTKV_{name.upper()}", str(value)) for name, value in defines.items())
        return cls(kernel, tuple(sorted(named)))

    @property
    def source(self) -> str:
        """Text of the kernel's `.cu` file."""
        return (kernel_folder() / f"{self.kernel}.cu").read_text("utf-8")

    def options(self, arch: str) -> tuple[str, ...]:
        """NVRTC's options; `arch` as `sm_90a`."""
        return (
            "-std=c++17",
            "-default-device",  # generic lambdas have no place for __device__
            f"-arch={arch}",
            f"-I{kernel_folder()}",
            f"-DFASTKV_SOURCES={source_digest(self.kernel)}",
            *(f"-D{name}={value}" for name, value in self.defines),
        )


@cache
def kernel_folder() -> Path:
    """Where the kernels lie: an installed package is a folder, never a zip."""
    return Path(str(resources.files("fastkv.ops.cuda") / "kernels"))


def kernels() -> list[str]:
    """Names of all kernels, sorted."""
    return sorted(path.stem for path in kernel_folder().glob("*.cu"))


def sources(kernel: str | None = None) -> list[Path]:
    """The files that a kernel is compiled from, sorted; if None, every source and header.

    Raises:
        FileNotFoundError: there is no such kernel, or a header of it is missing.
        ValueError: it includes by a macro that `includes.HEADER_MACROS` does not know.
    """
    folder = kernel_folder()
    if kernel is not None:
        return closure(folder, f"{kernel}.cu")
    return sorted(p for p in folder.rglob("*") if p.suffix in {".cu", ".cuh"})


@cache
def source_digest(kernel: str | None = None) -> str:
    """16 hex digits over `sources(kernel)`, names included; raises as that does."""
    folder = kernel_folder()
    digest = hashlib.sha256()
    for path in sources(kernel):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def source_digests(names: Iterable[str] | None = None) -> dict[str, str]:
    """The digest of each of these kernels, by name; of all if None."""
    return {name: source_digest(name) for name in sorted(kernels() if names is None else names)}


#: Where warpgroups multiply (`wgmma`): the instructions are this architecture's alone.
WARPGROUPS_ARCH = "sm_90a"


def arch_of(sm: int) -> str:
    """NVRTC's name of a compute capability: Hopper with its own instructions, others plain."""
    return WARPGROUPS_ARCH if sm == 90 else f"sm_{sm}"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What launchers ask of a device.

    Attributes:
        sm: compute capability, 90 for 9.0.
        multiprocessors: their number.
        shared_per_block: bytes of shared memory that a block may opt in to.
        shared_per_multiprocessor: bytes of shared memory of a multiprocessor.
    """

    sm: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


@cache
def device_facts(index: int) -> DeviceFacts:
    """Facts of device `index`."""
    device = _cupy().cuda.Device(index)
    attributes = device.attributes
    return DeviceFacts(
        int(device.compute_capability),
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
    )


_compiled: dict[tuple[Specialization, int], Any] = {}
_lock = threading.Lock()


def loaded() -> int:
    """How many functions this process has loaded, on all devices."""
    return len(_compiled)


def loaded_kernels() -> set[str]:
    """Kernels of which this process has loaded a function."""
    return {what.kernel for what, _ in list(_compiled)}  # a thread may add one meanwhile


def function(what: Specialization, index: int) -> Any:
    """CuPy's function of a specialization, loaded on device `index`; compiled once a process."""
    found = _compiled.get((what, index))
    if found is None:
        with _lock:  # two threads at once would compile twice
            found = _compiled.get((what, index))
            if found is None:
                found = _compiled[what, index] = _compile(what, index)
    return found


def _compile(what: Specialization, index: int) -> Any:
    cupy = _cupy()
    with cupy.cuda.Device(index):
        options = what.options(arch_of(device_facts(index).sm))
        module = cupy.RawModule(code=what.source, options=options, backend="nvrtc")
        return module.get_function(what.kernel)


def _cupy() -> Any:
    require("cupy", "A CUDA kernel", INSTALL)
    import cupy

    return cupy
