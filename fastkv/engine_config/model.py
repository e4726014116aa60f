# SPDX-License-Identifier: Apache-2.0
"""What a model's `config.json` says about its KV cache, in any of the forms that engines read.

Whatever would make the count wrong is refused by the name of its key: nothing here guesses.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastkv.dtypes import FLOATS, canonical_float
from fastkv.engine_config.quantization import configured_format
from fastkv.engine_config.section import Section
from fastkv.errors import SpecError, UnsupportedError
from fastkv.quant import Granularity, QuantType
from fastkv.spec import CacheSpec

MAX_LAYERS = 10_000

# Where the language model of a multimodal config lies.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")

# Layers by kind: the key of the window behind which they see nothing, or None if they see all.
_WINDOW_KEYS = {
    "full_attention": None,
    "attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
_WITHOUT_CACHE = ("linear_attention", "mamba", "conv")
_KIND_KEYS = ("layer_types", "layers_block_type")

# Keys of caches that are not K and V of one shape in each layer.
_REFUSED = {
    "kv_lora_rank": "no MLA: it caches a latent vector, not K and V",
    "compress_ratios": "no compressed K and V",
    "num_kv_shared_layers": "no layers that share the cache of another",
    "global_head_dim": "one head_dim for all layers",
    "swa_head_dim": "one head_dim for all layers",
    "num_global_key_value_heads": "one number of KV heads for all layers",
    "swa_num_key_value_heads": "one number of KV heads for all layers",
    "block_configs": "the same attention in all layers",
    "cross_attention_layers": "self-attention only",
    "is_encoder_decoder": "self-attention only",
}
# Keys that say in their own way which layers have attention; harmless beside `layer_types`.
_OWN_PATTERNS = (
    "full_attention_interval",
    "hybrid_override_pattern",
    "attn_layer_period",
    "attn_layer_indices",
    "full_attn_idxs",
    "linear_attn_config",
)
# Keys that give the KV heads their own way, in configs without `num_key_value_heads`.
_OWN_KV_HEADS = ("num_kv_heads", "n_head_kv", "multi_query", "multi_query_group_num", "attn_config")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The KV cache that a model's config asks for.

    Attributes:
        num_layers: layers that keep K and V; in a hybrid model fewer than all.
        num_kv_heads: Hkv of the whole model, before any sharding.
        head_dim: D.
        dtype: the model's dtype, which an unquantized cache stores.
        quant: format of the cache that a config asks for; None where there is no config.
        granularity: of that format's static multipliers; None is the format's preferred one.
        windows: for each of those layers, the tokens that it sees, None for all; empty if all do.
        notes: what a reader of the numbers should know.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    quant: QuantType | None = None
    granularity: Granularity | None = None
    windows: tuple[int | None, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            got, expected = f"{len(self.windows)}", f"none, or {self.num_layers}, one a layer"
            raise SpecError("ModelConfig", "windows", expected=expected, got=got)

    def spec(
        self, page_size: int, quant: QuantType | str | None = None, scale_dtype: str = "float32"
    ) -> CacheSpec:
        """The spec of the model's cache; `quant` takes another format than the config's."""
        configured = QuantType.NONE if self.quant is None else self.quant
        return CacheSpec(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            page_size,
            configured if quant is None else quant,
            self.dtype,
            scale_dtype,
        )


def spec_from_config(
    config: Mapping[str, object] | str | Path,
    page_size: int = 64,
    *,
    scale_dtype: str = "float32",
    source: str = "config",
) -> CacheSpec:
    """The cache spec that a Hugging Face config asks for, its KV-cache quantization included.

    Args:
        config: the parsed config, or the path of the file or of its folder.
        page_size: P; no config says it.
        scale_dtype: dtype of the paged scales of dynamic formats.
        source: names a parsed config in errors; a path names itself.

    Raises:
        SpecError: a key is missing or has a value no cache can have.
        UnknownNameError: a KV-cache quantization that nobody knows.
        UnsupportedError: a cache that fastkv does not have, such as MLA's.
        OSError: the file cannot be read.
    """
    if isinstance(config, Mapping):
        return parse_config(config, source).spec(page_size, scale_dtype=scale_dtype)
    return read_config(config).spec(page_size, scale_dtype=scale_dtype)


def read_config(path: str | Path) -> ModelConfig:
    """The cache of a model, from its `config.json` or the folder with it; raises as above."""
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise SpecError(
            str(path), "the file", expected="JSON", got=f"{type(error).__name__}: {error}"
        ) from error
    return parse_config(config, str(path))


def parse_config(config: object, source: str = "config") -> ModelConfig:
    """The cache of a model, from its parsed config; `source` names it in errors."""
    if not isinstance(config, Mapping):
        raise SpecError(source, "the file", expected="a JSON object", got=reprlib.repr(config))
    top = Section(source, "", config)
    text = _language_model(top)
    for section in (top, text):
        _refuse(section)
    notes: list[str] = []
    windows = _windows(text, notes)
    quant, granularity = configured_format(top, text)
    return ModelConfig(
        num_layers=len(windows),
        num_kv_heads=_kv_heads(text, notes),
        head_dim=_head_dim(text),
        dtype=_dtype(top, text, notes),
        quant=quant,
        granularity=granularity,
        windows=windows,
        notes=tuple(notes),
    )


def _language_model(top: Section) -> Section:
    found = [section for section in map(top.section, _TEXT_SECTIONS) if section is not None]
    for section in (*found, top):
        if "num_hidden_layers" in section.values:
            return section
    return found[0] if found else top  # of those, the one to name in the error


def _refuse(section: Section) -> None:
    for key, expected in _REFUSED.items():
        if section.values.get(key):
            raise section.refused(key, expected)


def _windows(text: Section, notes: list[str]) -> tuple[int | None, ...]:
    """The window of each layer that keeps K and V; None where a layer sees all tokens."""
    layers = text.integer("num_hidden_layers", MAX_LAYERS)
    if text.values.get("num_nextn_predict_layers"):
        notes.append("Draft layers (num_nextn_predict_layers) have caches too; not counted.")
    kinds = _kinds(text, layers)
    if kinds is None:
        if text.values.get("sliding_window") and text.values.get("use_sliding_window", True):
            notes.append("sliding_window is set, but no layer_types: all layers counted in full.")
        return (None,) * layers
    without = Counter(kind for kind in kinds if kind in _WITHOUT_CACHE)
    if without.total() == layers:
        raise text.refused(_kind_key(text), "a layer with attention")
    if without:
        notes.append(
            f"{without.total()} of {layers} layers ({', '.join(without)}) keep no K and V; "
            "their state is not counted."
        )
    keys = [_WINDOW_KEYS[kind] for kind in kinds if kind in _WINDOW_KEYS]
    return tuple(None if key is None else text.integer(key) for key in keys)


def _kind_key(text: Section) -> str:
    keys = (*_KIND_KEYS, "attn_type_list")
    return next((key for key in keys if text.values.get(key) is not None), "")


def _kinds(text: Section, layers: int) -> list[str] | None:
    """The kind of each layer; None if the config names none and all have attention."""
    key = _kind_key(text)
    if not key:
        for pattern in _OWN_PATTERNS:
            if text.values.get(pattern):
                raise text.refused(pattern, "layer_types, which names the kind of each layer")
        return None
    kinds = text.values[key]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise text.wrong(key, f"a list of {layers}, one a layer (num_hidden_layers)")
    if key == "attn_type_list":  # MiniMax: 1 is softmax attention, 0 linear
        names = [(0, "linear_attention"), (1, "full_attention")]
        kinds = [next((name for i, name in names if i == kind), kind) for kind in kinds]
    known = (*_WINDOW_KEYS, *_WITHOUT_CACHE)
    for i, kind in enumerate(kinds):
        if kind not in known:
            name = f"{text.prefix}{key}[{i}]"
            raise UnsupportedError(
                text.source, name, expected=f"one of {', '.join(known)}", got=reprlib.repr(kind)
            )
    return kinds


def _kv_heads(text: Section, notes: list[str]) -> int:
    if text.values.get("num_key_value_heads") is not None:
        return text.integer("num_key_value_heads")
    for key in _OWN_KV_HEADS:
        if text.values.get(key):
            raise text.refused(key, "num_key_value_heads instead")
    if text.values.get("num_attention_heads") is None:
        raise text.wrong("num_key_value_heads", "an integer, or num_attention_heads")
    notes.append("No num_key_value_heads: as many KV heads as attention heads.")
    return text.integer("num_attention_heads")


def _head_dim(text: Section) -> int:
    if text.values.get("head_dim") is not None:
        dim = text.integer("head_dim")
    elif text.values.get("hidden_size") is None:
        raise text.wrong("head_dim", "an integer, or hidden_size and num_attention_heads")
    else:
        hidden, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
        if hidden % heads:
            raise text.wrong("hidden_size", f"a multiple of the {heads} num_attention_heads")
        dim = hidden // heads
    if text.values.get("v_head_dim") not in (None, dim):
        raise text.refused("v_head_dim", f"the head_dim of K, {dim}")
    return dim


def _dtype(top: Section, text: Section, notes: list[str]) -> str:
    for section in (text, top):
        for key in ("dtype", "torch_dtype"):
            value = section.values.get(key)
            if value is None:
                continue
            dtype = canonical_float(value)
            if dtype is None:
                raise section.wrong(key, f"one of {', '.join(FLOATS)}")
            return dtype
    notes.append("No dtype: bfloat16 assumed.")
    return "bfloat16"
