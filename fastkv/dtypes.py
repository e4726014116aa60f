# SPDX-License-Identifier: Apache-2.0
"""Names and sizes of the dtypes that fastkv speaks of, without an array library."""

from collections.abc import Mapping
from types import MappingProxyType

ITEMSIZE: Mapping[str, int] = MappingProxyType(
    {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "float8_e4m3fn": 1,
        "int8": 1,
        "uint8": 1,
        "int32": 4,
    }
)

#: What activations, outputs and an unquantized cache may be stored in.
FLOATS = ("bfloat16", "float16", "float32")

_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def canonical_float(name: object) -> str | None:
    """The full name of a float dtype (`bf16` → `bfloat16`), or None if it is none of `FLOATS`.

    Takes names, and the dtype objects of the array libraries: `np.float32`, `torch.bfloat16`.
    """
    text = name.__name__ if isinstance(name, type) else str(name).rpartition(".")[2]
    text = _ALIASES.get(text, text)
    return text if text in FLOATS else None
