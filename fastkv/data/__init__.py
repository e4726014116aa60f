# SPDX-License-Identifier: Apache-2.0
"""Data files of the package: a sample of a real model's Q, K and V, described in README.md."""
