# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share: timing, data, peers, ceilings and the written result."""
