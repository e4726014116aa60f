# SPDX-License-Identifier: Apache-2.0
"""fastkv underneath engines: one package each. Importing one imports no array library."""
