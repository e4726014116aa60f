# SPDX-License-Identifier: Apache-2.0
"""Without their libraries the integrations say which line installs them."""

import pytest

BLOCKED = """
import sys
import fastkv

assert not {"torch", "transformers"} & set(sys.modules)
sys.modules["torch"] = None  # as if it were not installed
try:
    import fastkv.integrations.{module}
except fastkv.errors.MissingDependencyError as error:
    print(error)
"""


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_a_missing_library_is_asked_for_by_its_extra(run_python, module):
    said = run_python(BLOCKED.replace("{module}", module)).stdout
    assert said == (
        f"fastkv.integrations.{module} needs torch, which is not installed: "
        f"pip install 'fastkv[{module}]'\n"
    )
