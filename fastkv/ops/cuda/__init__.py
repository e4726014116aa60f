# SPDX-License-Identifier: Apache-2.0
"""The ops on an NVIDIA GPU.

One launcher an op, of the op's name, over kernels/<op>.cu of the same name: it picks the
specialization, packs the parameters and launches once. `jit` compiles, `launch` launches,
`workspace` holds what a kernel needs beside its arguments. Nothing here reads device memory.
"""
