# SPDX-License-Identifier: Apache-2.0
"""The sample that ships with fastkv: real Q, K and V of three layers, before RoPE."""

from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import ml_dtypes  # noqa: F401 - safetensors reads bfloat16 only once this is imported
import numpy as np
from safetensors import safe_open

from fastkv.rope import Rope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

_FILE = "smollm2_sample.safetensors"


@dataclass(frozen=True, slots=True)
class SampleLayer:
    """One layer of the sample.

    Attributes:
        qkv: `[T, (Hq + 2*Hkv) * D]` float32 (bfloat16 values), before RoPE.
        k_min: `[Hkv, D]`, smallest K after RoPE on other text; likewise the other three.
        k_max: see `k_min`.
        v_min: see `k_min`.
        v_max: see `k_min`.
    """

    qkv: "F32"
    k_min: "F32"
    k_max: "F32"
    v_min: "F32"
    v_max: "F32"


@dataclass(frozen=True, slots=True)
class Sample:
    """Consecutive tokens of a text, as three layers of a model saw them.

    Attributes:
        model: its name.
        layers: the layers.
        layer_ids: their places in the model.
        num_q_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        rope_theta: base of the rotary embedding.
    """

    model: str
    layers: tuple[SampleLayer, ...]
    layer_ids: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.layers[0].qkv)

    def rope(self) -> Rope:
        """Tables for every position of the sample."""
        return Rope.from_theta(self.rope_theta, self.head_dim, self.num_tokens)


def load_sample() -> Sample:
    """The sample inside the installed package."""
    with (
        as_file(files("fastkv.data") / _FILE) as path,
        safe_open(path, framework="numpy") as file,
    ):
        meta = file.metadata()
        layer_ids = tuple(int(i) for i in meta["layer_ids"].split(","))
        names = ("qkv", "k_min", "k_max", "v_min", "v_max")
        layers = tuple(
            SampleLayer(*(file.get_tensor(f"layers.{i}.{n}").astype(np.float32) for n in names))
            for i in range(len(layer_ids))
        )
    return Sample(
        model=meta["model"],
        layers=layers,
        layer_ids=layer_ids,
        num_q_heads=int(meta["num_q_heads"]),
        num_kv_heads=int(meta["num_kv_heads"]),
        head_dim=int(meta["head_dim"]),
        rope_theta=float(meta["rope_theta"]),
    )
