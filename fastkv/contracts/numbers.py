# SPDX-License-Identifier: Apache-2.0
"""Numbers of the host, Python's and NumPy's.

What an array library calls a scalar may live on a device, where comparing it would read it back; a
bool is a slip.
"""

from math import isfinite
from numbers import Integral, Real
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, infinities and NaN included."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a real number that is finite."""
    return is_number(value) and isfinite(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer."""
    return isinstance(value, Integral) and not isinstance(value, bool)
