# SPDX-License-Identifier: Apache-2.0
"""fastkv inside other libraries; each module imports its own, and `import fastkv` none of them."""
