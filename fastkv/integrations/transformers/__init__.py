# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="fastkv" for transformers 5, and the cache that it attends over.

Importing this module registers the name; `docs/transformers.md` has examples.
"""

from fastkv.optional import require

for _name in ("torch", "transformers"):
    require(_name, "fastkv.integrations.transformers", "pip install 'fastkv[transformers]'")

# E402: what is missing has been named by now, with the line that installs it.
from fastkv.integrations.transformers.attention import register  # noqa: E402
from fastkv.integrations.transformers.cache import PagedCache  # noqa: E402
from fastkv.integrations.transformers.continuous import continuous_batching  # noqa: E402
from fastkv.integrations.transformers.scales import calibrate  # noqa: E402

__all__ = ["PagedCache", "calibrate", "continuous_batching", "register"]

register()
