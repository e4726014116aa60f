# SPDX-License-Identifier: Apache-2.0
"""The devices of this machine, as the installed libraries see them."""

from typing import Any

from fastkv.backends.kernels import Device


def found_devices() -> tuple[list[Device], list[str]]:
    """The CPU and every GPU that an installed library sees, and remarks on what was asked."""
    devices, notes = [Device("cpu")], []
    for name, capabilities in (("cupy", _cupy), ("torch", _torch)):
        try:
            found = [Device("cuda", sm) for sm in capabilities()]
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a broken driver raises each library's own exceptions
            notes.append(f"{name} sees no GPU: {type(error).__name__}: {error}")
            continue
        if found:
            return devices + found, [*notes, f"{name} sees {len(found)} GPU(s)"]
        notes.append(f"{name} sees no GPU")
    return devices, notes or ["no library here that sees GPUs (CuPy, PyTorch)"]


def _cupy() -> list[int]:
    import cupy

    count = int(cupy.cuda.runtime.getDeviceCount())
    return [int(cupy.cuda.Device(i).compute_capability) for i in range(count)]


def _torch() -> list[int]:
    import torch

    count: Any = torch.cuda.device_count()
    pairs = [torch.cuda.get_device_capability(i) for i in range(count)]
    return [10 * major + minor for major, minor in pairs]
