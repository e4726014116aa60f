# SPDX-License-Identifier: Apache-2.0
"""Shows that the right tensors, scales and zero points reach each op of an attention backend.

Runs on a CPU and reads no values: every tensor is a sentinel. A backend is either driven through
fastkv's ops, which are injected (`make_backend(ops)`), or reports what its own kernels were called
with (`run(case)`, a list of `Observation`).
"""

from fastkv.testing.conformance.cases import Case, Layout, cases
from fastkv.testing.conformance.check import check, check_backend, faults
from fastkv.testing.conformance.faults import ConformanceError, Fault
from fastkv.testing.conformance.observations import Observation, Role

__all__ = [
    "Case",
    "ConformanceError",
    "Fault",
    "Layout",
    "Observation",
    "Role",
    "cases",
    "check",
    "check_backend",
    "faults",
]
