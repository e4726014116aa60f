# SPDX-License-Identifier: Apache-2.0
"""`fastkv eval`: what a cache format does to a whole model.

A NumPy decoder of Llama models reads a GGUF file; its attention is fastkv, over a paged cache in
the format under test. Each format is compared, token by token, with the same model over a float32
cache.
"""
