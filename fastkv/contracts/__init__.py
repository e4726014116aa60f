# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: the checks that need no values and no array library.

`presence` says which tensors a format requires and refuses; `tensors` compares shapes, dtypes,
libraries and devices; `numbers` tells host numbers from others; `calls` holds one contract per op.
"""
