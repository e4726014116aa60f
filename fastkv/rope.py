# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding tables."""

from dataclasses import dataclass
from typing import Any

from fastkv.errors import ShapeError
from fastkv.flat import Flat


@dataclass(frozen=True, slots=True)
class Rope(Flat):
    """Cosines and sines of a rotary embedding (Su et al., RoFormer, arXiv:2104.09864).

    Row p holds the angles of position p. The first `rotary_dim = 2 * cos.shape[1]` elements of a
    head are rotated, the rest pass through.

    Attributes:
        cos: float32 `[max_len, rotary_dim / 2]`.
        sin: as `cos`.
        interleaved: False pairs element i with `i + rotary_dim/2` (NeoX, Llama in transformers);
            True pairs `2i` with `2i + 1` (GPT-J).
    """

    cos: Any
    sin: Any
    interleaved: bool = False

    @classmethod
    def from_theta(
        cls, theta: float, rotary_dim: int, max_len: int, *, interleaved: bool = False
    ) -> "Rope":
        """NumPy tables with the angles `p * theta ** (-2i / rotary_dim)`, computed in float64.

        Raises:
            ShapeError: an odd `rotary_dim`.
        """
        import numpy as np

        if rotary_dim % 2:
            raise ShapeError(
                "Rope.from_theta", "rotary_dim", expected="an even number", got=str(rotary_dim)
            )
        exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
        angles = np.outer(np.arange(max_len, dtype=np.float64), theta**-exponents)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return cls(cos, sin, interleaved)
