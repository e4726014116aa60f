# SPDX-License-Identifier: Apache-2.0
"""What the errors of `fastkv calibrate` have in common."""

OP = "fastkv calibrate"
