# SPDX-License-Identifier: Apache-2.0
"""The ops in NumPy: the specification.

One module an op, of the op's name, on NumPy arrays that the op has checked. Each function first
checks the values of the batch's metadata, and only then writes. Arithmetic is float32.
"""
