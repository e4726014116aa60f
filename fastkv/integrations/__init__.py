# SPDX-License-Identifier: Apache-2.0
"""fastkv inside engines and other libraries; `import fastkv` imports none of them."""
