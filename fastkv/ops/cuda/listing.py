# SPDX-License-Identifier: Apache-2.0
"""What there is to compile: representatives of every kernel and class of specialization.

A launcher module (`fastkv/ops/cuda/<op>.py`) lists its own in

    def specializations() -> list[jit.Specialization]

each complete, `FASTKV_PARAMS_BYTES` included. `tox -e cuda-compile` compiles all of them for every
architecture; no GPU and no CuPy is needed to list them.
"""

import pkgutil
import re
from collections.abc import Callable
from importlib import import_module

from fastkv.ops import cuda
from fastkv.ops.cuda.jit import WARPGROUPS_ARCH, Specialization

#: What the list is compiled for: each generation from sm_80, as `jit.arch_of` or newer.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")

# Bytes of shared memory that a block may have on each (CUDA C++ Programming Guide, "Compute
# Capabilities"); less on sm_89 and sm_120 than on the data-center parts of their generation.
_SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_120": 99 * 1024,
}
_NEEDS_SM_89 = re.compile("fp8|e4m3", re.IGNORECASE)


def launchers() -> list[str]:
    """The ops whose launcher lists specializations, sorted."""
    names = sorted(module.name for module in pkgutil.iter_modules(cuda.__path__))
    return [name for name in names if _lister(name) is not None]


def specializations() -> list[Specialization]:
    """Every listed specialization, launcher after launcher, each once."""
    found: dict[Specialization, None] = {}
    for name in launchers():
        lister = _lister(name)
        assert lister is not None, "launchers() returns those that have one"
        found |= dict.fromkeys(lister())
    return list(found)


def least_sm(what: Specialization) -> int:
    """The oldest architecture that a specialization is made for.

    fp8 conversions are instructions of sm_89; whose constants name fp8 or e4m3 is never built for
    an older one.
    """
    return 89 if any(_NEEDS_SM_89.search(value) for _, value in what.defines) else 80


def is_for(what: Specialization, arch: str) -> bool:
    """Whether a specialization is built for an architecture: instructions, shared memory.

    A constant `FASTKV_SHARED_BYTES` is the dynamic shared memory of a block, `FASTKV_WARPGROUPS`
    not 0 needs the one architecture that has their instructions.
    """
    defines = dict(what.defines)
    if arch != WARPGROUPS_ARCH and defines.get("FASTKV_WARPGROUPS", "0") != "0":
        return False
    shared = int(defines.get("FASTKV_SHARED_BYTES", "0"))
    return sm_of(arch) >= least_sm(what) and shared <= _SHARED_BYTES[arch]


def sm_of(arch: str) -> int:
    """90 of `sm_90a`."""
    return int(arch.removeprefix("sm_").rstrip("af"))


def label(what: Specialization) -> str:
    """A specialization's name for people: kernel and constants, short."""
    constants = (
        f"{name.removeprefix('FASTKV_').lower()}={value}"
        for name, value in what.defines
        if name != "FASTKV_PARAMS_BYTES"
    )
    return f"{what.kernel}[{','.join(constants)}]"


def _lister(name: str) -> Callable[[], list[Specialization]] | None:
    module = import_module(f"fastkv.ops.cuda.{name}")
    # This module's own function is the sum, and not a part of it.
    if module.__name__ == __name__:
        return None
    found: Callable[[], list[Specialization]] | None = getattr(module, "specializations", None)
    return found
