# SPDX-License-Identifier: Apache-2.0
"""`fastkv calibrate`: static scales from the K and V of a real model.

A model reads a text; each layer's K (after RoPE, as it is cached) and V go into a sketch of fixed
size and are forgotten. Methods turn the sketches into ranges, and those into `StaticScales`.
"""
