# SPDX-License-Identifier: Apache-2.0
"""NVRTC without a GPU: from a specialization to a binary, and what the assembler says of it."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# CuPy appends this to every compilation.
CUPY_ADDS = ("-ftz=true",)
# The assembler then logs the registers and spilled bytes of each kernel.
VERBOSE = ("--ptxas-options=-v",)
# C7508, C7517: wgmma was serialized, or a setmaxnreg ignored. The kernel runs, and is slow.
_SERIALIZED = re.compile(r".*\bC75(?:08|17)\b.*")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Compiled:
    """What became of one compilation.

    Attributes:
        ok: a binary was made.
        log: what the compiler and the assembler printed.
        binary: the cubin; empty where there is none.
    """

    ok: bool
    log: str
    binary: bytes


def compile_source(source: str, name: str, options: tuple[str, ...]) -> Compiled:
    """Compile to a cubin. `options` holds the architecture."""
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    every = [option.encode() for option in (*options, *CUPY_ADDS, *VERBOSE)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(every), every)
    log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    ok = status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    binary = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)) if ok else 0)
    if ok:
        _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return Compiled(ok, log.decode(errors="replace").rstrip("\0\n "), bytes(binary))


def compile_specialization(what, arch: str) -> Compiled:
    """Compile a `fastkv.ops.cuda.jit.Specialization` as `jit` would, for any architecture.

    The headers lie in a folder that holds only what the kernel's digest covers: a header that is
    included and not covered does not compile.
    """
    from fastkv.ops.cuda import jit

    folder, options = jit.kernel_folder(), what.options(arch)
    with TemporaryDirectory() as covered:
        for path in jit.sources(what.kernel):
            copy = Path(covered) / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        at = options.index(f"-I{folder}")
        return compile_source(
            what.source, what.kernel, (*options[:at], f"-I{covered}", *options[at + 1 :])
        )


def faults(compiled: Compiled, entry: str) -> list[str]:
    """Why a compilation does not pass; empty when it does."""
    if not compiled.ok:
        return [f"does not compile:\n{compiled.log}"]
    found = [line.strip() for line in compiled.log.splitlines() if _SERIALIZED.match(line)]
    spilled = [pair for pair in _SPILLS.findall(compiled.log) if pair != ("0", "0")]
    found += [f"spills {stores} bytes, reloads {loads}" for stores, loads in spilled]
    if not _SPILLS.search(compiled.log):
        found.append("the assembler reported no spill counts: -v has no effect")
    if f".text.{entry}\0".encode() not in compiled.binary:
        found.append(f"the binary has no kernel {entry}")
    return found


def _checked(answer):
    from cuda.bindings import nvrtc

    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {status!r}")
    return values[0] if values else None
